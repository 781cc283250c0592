"""The head of the ledger, kept in a file beside it, so that a ledger that lost its end or all of itself is noticed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from aslseg.files import write_json


@dataclass(frozen=True)
class Head:
    """How many events a ledger has, and the hash of the last one."""

    events: int
    sha256: str


def anchor_path(ledger: Path) -> Path:
    """Where the head of a ledger is kept."""
    return ledger.with_name(f"{ledger.stem}.head.json")


def read_head(path: Path) -> Head | None:
    """The head that was written last; None if there is no such file, or it cannot be read."""
    try:
        content = json.loads(path.read_text())
        return Head(int(content["events"]), str(content["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_head(path: Path, head: Head) -> None:
    """Replace the file atomically.

    Raises:
        DiskFullError, FileWriteError: As :func:`aslseg.files.write_json`.
    """
    write_json(path, asdict(head))
