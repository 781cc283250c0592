"""One round at a time for a studies folder: an operating-system lock, which is released when its process ends."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aslseg.errors import RoundRunningError
from aslseg.files import write_json


@contextmanager
def round_lock(home: Path) -> Iterator[None]:
    """Lock the studies folder for the length of the block.

    Args:
        home: :attr:`aslseg.settings.Paths.home`, on a local disk.

    Raises:
        RoundRunningError: Another process has the lock; the message says which one and since when.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / "round.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RoundRunningError(f"{home.parent}: {_describe(owner(home))}; wait for it or stop it") from None
    try:
        since = datetime.now(UTC).isoformat("T", "seconds")
        content = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        write_json(home / "round.owner.json", content)
        yield
    finally:
        (home / "round.owner.json").unlink(missing_ok=True)
        lock.release()


def round_runs(home: Path) -> bool:
    """Whether some process has the lock."""
    try:
        with round_lock(home):
            return False
    except RoundRunningError:
        return True


def owner(home: Path) -> dict[str, Any]:
    """The process that has the lock, or had it when it was killed: ``pid``, ``host``, ``since``; empty if unknown."""
    try:
        return dict(json.loads((home / "round.owner.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _describe(who: dict[str, Any]) -> str:
    if not who:
        return "a round is already running"
    return f"a round is already running (process {who.get('pid')} on {who.get('host')} since {who.get('since')})"
