"""From an error with a message to the HTTP answer that carries it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from aslseg.errors import (
    AslsegError,
    BadImageError,
    BadLabelError,
    BadPromptError,
    BadSettingsError,
    BadWeightsError,
    DiskFullError,
    NoModelError,
    NotEnoughCasesError,
    RoundRunningError,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RefusedError(AslsegError):
    """A client asked for what it may not have or what does not exist.

    Args:
        message: What was expected, what came, what to do.
        status: HTTP status code of the answer.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


_STATUS: dict[type[AslsegError], int] = {
    BadImageError: 422,
    BadLabelError: 422,
    BadPromptError: 400,
    BadSettingsError: 400,
    NotEnoughCasesError: 409,
    RoundRunningError: 409,
    NoModelError: 503,
    BadWeightsError: 503,
    DiskFullError: 507,
}


def status_of(error: AslsegError) -> int:
    """HTTP status code for an error: 4xx where the client can mend it, 5xx where the server's keeper must."""
    if isinstance(error, RefusedError):
        return error.status
    return next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)


def safe_name(name: Any, what: str) -> str:
    """A name that a client may bring into the file system.

    Raises:
        RefusedError: Separators, a leading dot, control characters, or longer than 128 characters.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RefusedError(
            f"{what} {str(name)[:80]!r} is not allowed; expected letters, digits, '.', '_' and '-', beginning with "
            "a letter or digit, at most 128 characters"
        )
    return name


def inside(path: Path, root: Path) -> Path:
    """The path, if it lies in ``root`` after links are followed.

    Raises:
        RefusedError: A link leads outside.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise RefusedError(
            f"{path.name}: a link leads out of {root.name}; nothing is written there. Replace the link by a folder",
            403,
        )
    return path
