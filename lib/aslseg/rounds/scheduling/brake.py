"""What holds a round up between two of its steps: annotators who click, and the end of its window of time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Protocol

from aslseg.errors import OutOfTimeError
from aslseg.rounds.scheduling.schedule import utc_now

CLICK_SECONDS = 5.0
"""How long after the last answer to an annotator a round waits."""
LONGEST_ANSWER = 60.0
"""How long a round waits for one answer at most; a server that is killed before it answers holds it up no longer."""
WHOLE_STAGES = ("sam", "adapter", "publish", "originals")
"""Stages that keep nothing of what is half done, or are short: these are done to their end."""


class Brake(Protocol):
    """Called before a stage and after each step or scan of it."""

    def __call__(self, stage: str, begins: bool = False) -> float:
        """Wait, or end the work.

        Args:
            stage: The running stage, or the one that is about to begin.
            begins: It is about to begin.

        Returns:
            Seconds for which it waited.

        Raises:
            OutOfTimeError: The work has to end here; everything up to here is kept.
        """


class NoBrake:
    """Goes on at once."""

    def __call__(self, stage: str, begins: bool = False) -> float:
        return 0.0


NO_BRAKE = NoBrake()


class RoundBrake:
    """Waits while somebody clicks, and ends the work at a given time.

    Args:
        home: :attr:`aslseg.settings.Paths.home`, where the server notes clicks.
        until: When the work ends; None never.
        clock: The time in UTC, for tests.
        sleep: Waits some seconds.
    """

    def __init__(
        self,
        home: Path,
        until: datetime | None = None,
        clock: Callable[[], datetime] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.home, self.until, self.sleep = home, until, sleep
        self.clock = clock or utc_now

    def __call__(self, stage: str, begins: bool = False) -> float:
        waited = 0.0
        while True:
            if self.until is not None and self.clock() >= self.until and (begins or stage not in WHOLE_STAGES):
                raise OutOfTimeError(
                    f"the time for this round ended {'before' if begins else 'in'} the stage {stage}; what is done is "
                    "kept, and the next round goes on from here"
                )
            if not clicked(self.home):
                return waited
            start = time.monotonic()
            self.sleep(0.2)
            waited += time.monotonic() - start


@contextmanager
def answering(home: Path) -> Iterator[None]:
    """Note that somebody works with the server: while a request is answered, and up to its end.

    A home that cannot be written to is no reason to refuse a click.
    """
    _note(home, LONGEST_ANSWER)
    try:
        yield
    finally:
        _note(home, 0.0)


def clicked(home: Path) -> bool:
    """Whether somebody waits for the server, or has worked with it in the last seconds."""
    try:
        age = time.time() - _file(home).stat().st_mtime
    except OSError:
        return False
    # a time further in the future is one of before the clock was moved back
    return -LONGEST_ANSWER <= age < CLICK_SECONDS


def _note(home: Path, ahead: float) -> None:
    now = time.time() + ahead
    with suppress(OSError):
        _file(home).touch()
        os.utime(_file(home), (now, now))


def _file(home: Path) -> Path:
    return home / "clicked"
