"""Every write of a process that outlives it: a file that gets its name or loses it, and a transaction of the ledger."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

from aslseg.rounds.ledger.ledger import Ledger

# written again by every run: dying at these would never get anywhere
NOT_COUNTED = ("progress.json", "round.owner.json", "new.nii.gz")

Hook = Callable[[str], None]


def nothing(_: str) -> None:
    """No hook."""


@contextmanager
def watched(before: Hook, after: Hook = nothing) -> Iterator[None]:
    """Call hooks around each durable write of this process.

    Args:
        before: With what is about to be written, such as ``replace /studies/a.nii.gz`` or ``append mask original``.
        after: With the same.
    """

    def around(write: Callable[..., Any], what: Callable[..., str]) -> Callable[..., Any]:
        def wrapper(*args: Any, **more: Any) -> Any:
            text = what(*args)
            if text:
                before(text)
            result = write(*args, **more)
            if text:
                after(text)
            return result

        return wrapper

    def replaced(source: Any, target: Any) -> str:
        return "" if Path(target).name in NOT_COUNTED else f"replace {target}"

    def unlinked(path: Any, **_: Any) -> str:
        name = Path(path).name
        return f"unlink {path}" if os.path.exists(path) and name not in NOT_COUNTED and name[0] != "." else ""

    def appended(ledger: Ledger, entries: Any) -> str:
        kinds = "+".join(sorted({e.kind for e in entries}))
        return f"append {kinds} {entries[0].tag or ''}" if entries else ""

    with (
        mock.patch.object(os, "replace", around(os.replace, replaced)),
        mock.patch.object(os, "unlink", around(os.unlink, unlinked)),
        mock.patch.object(Ledger, "append", around(Ledger.append, appended)),
        mock.patch.object(Ledger, "set_scores", around(Ledger.set_scores, lambda *_: "append scored")),
    ):
        yield


def die() -> None:
    """As after a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_number(number: int, act: Callable[[], None]) -> Hook:
    """A hook that acts at the n-th write, from 1."""
    count = 0

    def hook(_: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            act()

    return hook


def at_point(pattern: str, occurrence: int, act: Callable[[], None]) -> Hook:
    """A hook that acts at the n-th write that matches a pattern, from 1."""
    found = at_number(occurrence, act)

    def hook(text: str) -> None:
        if fnmatch(text, pattern):
            found(text)

    return hook


def killed_in_fork(work: Callable[[], object], number: int) -> bool:
    """Do some work in a fork of this process that dies just before its n-th durable write; whether it came so far."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with watched(at_number(number, die)):
                work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed in the child"
    return os.WIFSIGNALED(status)
