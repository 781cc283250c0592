"""The token file: who may log in, in which role. Imports nothing of the server."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from aslseg.errors import BadSettingsError

ROLES = ("annotator", "reviewer", "admin")
"""Each role may do what the one before may."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class TokenHolder:
    """A line of the token file.

    Attributes:
        name: Who logs in with the token.
        role: One of :data:`ROLES`.
        sha256: Hash of the token. Tokens are random, so that a plain hash cannot be guessed back.
    """

    name: str
    role: str
    sha256: str


def new_token_line(name: str, role: str) -> tuple[str, str]:
    """A new random token, and the line for the token file that accepts it.

    Raises:
        BadSettingsError: A name with other characters than letters, digits, '.', '_' and '-', or no such role.
    """
    token = secrets.token_urlsafe(32)
    line = f"{name} {role} {hashlib.sha256(token.encode()).hexdigest()}"
    _holder(line, "the new token")
    return token, line


def read_token_file(path: Path) -> list[TokenHolder]:
    """The holders of a token file: one line each, ``name role sha256``; lines that begin with ``#`` are comments.

    Raises:
        BadSettingsError: Unreadable, a line that cannot be understood, or no line at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettingsError(f"token_file {path} cannot be read ({error})") from None
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1)]
    holders = [_holder(line, f"token_file {path}, line {n}") for n, line in numbered if line and line[0] != "#"]
    if not holders:
        raise BadSettingsError(f"token_file {path} holds no token; make one with `aslseg token NAME --role annotator`")
    return holders


def _holder(line: str, where: str) -> TokenHolder:
    parts = line.split()
    if len(parts) != 3 or parts[1] not in ROLES or not NAME.fullmatch(parts[0]) or not HASH.fullmatch(parts[2]):
        raise BadSettingsError(
            f"{where}: expected `name role sha256` with a role of {', '.join(ROLES)}, and a name of letters, digits, "
            "'.', '_' and '-'; `aslseg token NAME --role ROLE` prints a line"
        )
    return TokenHolder(parts[0], parts[1], parts[2].lower())
