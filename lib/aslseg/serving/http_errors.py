"""HTTP status codes of errors, and the names that clients may bring into the file system."""

from __future__ import annotations

import re
from typing import Any

from aslseg.errors import (
    AslsegError,
    BadImageError,
    BadLabelError,
    BadPromptError,
    BadSettingsError,
    BadWeightsError,
    DiskFullError,
    FileWriteError,
    LedgerError,
    NoModelError,
    NoResourcesError,
    NotEnoughCasesError,
    RoundRunningError,
)

RETRY_SECONDS = 30
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RefusedError(AslsegError):
    """A client asked for something that is not allowed or does not exist.

    Args:
        message: What was expected, what came instead, and what to do.
        status: HTTP status code of the answer.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def pacs_error(error: Exception) -> RefusedError:
    """The answer where the PACS gave none, or one that is an error."""
    return RefusedError(f"the PACS does not answer ({type(error).__name__}); is it online?", 502)


_STATUS: dict[type[AslsegError], int] = {
    BadImageError: 422,
    BadLabelError: 422,
    BadPromptError: 400,
    BadSettingsError: 400,
    NotEnoughCasesError: 409,
    RoundRunningError: 409,
    NoModelError: 503,
    BadWeightsError: 503,
    LedgerError: 503,
    NoResourcesError: 503,
    FileWriteError: 503,
    DiskFullError: 507,
}


def status_of(error: AslsegError) -> int:
    """HTTP status code for an error: 4xx where the client can correct it, 5xx where the administrator must."""
    if isinstance(error, RefusedError):
        return error.status
    return next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)


def headers_of(error: AslsegError) -> dict[str, str]:
    """Headers of the answer: when to try again, where that alone may help."""
    later = isinstance(error, NoResourcesError | RefusedError) and status_of(error) == 503
    return {"Retry-After": str(RETRY_SECONDS)} if later else {}


def kept_name(name: Any) -> str:
    """The name under which an upload is kept whose own may be anything: ``unknown`` where :func:`safe_name` refuses."""
    return name if isinstance(name, str) and NAME.fullmatch(name) else "unknown"


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
