"""Moves the schedule's clock in every Python process that has this folder in PYTHONPATH, a server and its trainings.

Python imports a module of this name when it starts. The file that MOVED_CLOCK names holds the seconds by which the
clock is ahead; tests write another number into it while the server runs.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aslseg.rounds.scheduling import schedule
from aslseg.serving import scheduler

AHEAD = Path(os.environ["MOVED_CLOCK"])


def utc_now() -> datetime:
    """The time, moved."""
    return datetime.now(UTC) + timedelta(seconds=float(AHEAD.read_text()))


schedule.utc_now = utc_now
scheduler.EVERY_SECONDS = 0.3
