"""Starts rounds by itself: at night, after new labels, and never while somebody has stopped them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

from filelock import FileLock, Timeout
from monailabel.utils.async_tasks.utils import processes, tasks

from aslseg.rounds.scheduling import schedule
from aslseg.rounds.scheduling.lock import round_runs
from aslseg.rounds.scheduling.nights import MOST_STARTS, Nights
from aslseg.settings import Paths

logger = logging.getLogger(__name__)

EVERY_SECONDS = 10.0
WAITING_SECONDS = 60.0
"""How long a training may wait for its process; where the system starts none, MONAI Label's task waits for ever."""


class Scheduler:
    """Looks at the schedule now and then, and starts what is due.

    Of several servers on one studies folder the first one has the schedule, by a lock that ends with its process; the
    others take over when it is gone.

    Args:
        paths: The studies folder.
        nights: Says what is due.
        start: Starts a training task with a request.
        running: Whether this server trains.
        stop: Ends what this server trains.
    """

    def __init__(
        self,
        paths: Paths,
        nights: Nights,
        start: Callable[[dict[str, Any]], object],
        running: Callable[[], bool],
        stop: Callable[[], object],
    ) -> None:
        self.paths, self.nights = paths, nights
        self.start, self.running, self.stop = start, running, stop
        paths.home.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(paths.home / "schedule.lock", thread_local=False)

    def begin(self) -> None:
        """Look from now on, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="aslseg-schedule", daemon=True).start()

    def tick(self) -> bool:
        """Start what is due; returns whether something was started."""
        if not self._leads():
            return False
        now = schedule.utc_now()
        self.nights.expect(now)
        if self.running():
            # a stop that another server was asked for
            if self.nights.held() is not None:
                self.stop()
            return False
        due = self.nights.due(now)
        if due is None or round_runs(self.paths.home):
            return False
        request = {"model": "round", "night": due.night.key}
        if due.until is not None:
            request["until"] = due.until.isoformat()
        until = f", until {schedule.clock_text(due.until, self.nights.settings)}" if due.until else ""
        logger.info("a round starts by itself: %s%s", due.why, until)
        self.nights.note_start(due, now)
        self.start(request)
        return True

    def release(self) -> None:
        """Leave the schedule to another server."""
        self._lock.release()

    def _leads(self) -> bool:
        if not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                return False
        return True

    def _run(self) -> None:
        wait, known = threading.Event(), ""
        while True:
            try:
                self.tick()
                known = ""
            except Exception as error:  # without this thread no night would ever start again, and nobody would know
                reason = f"{type(error).__name__}: {error}"
                if reason != known:  # a full disk or a damaged ledger lasts for hours
                    logger.exception("the schedule could not be looked at; tried again every %g s", EVERY_SECONDS)
                known = reason
            wait.wait(EVERY_SECONDS)


def training_runs() -> bool:
    """Whether this server trains or is about to; a training whose process was not started becomes one that failed."""
    if processes("train"):
        return True
    for task in tasks("train"):
        if task["status"] != "SUBMITTED":
            continue
        age = datetime.today() - datetime.strptime(task["start_ts"], "%Y-%m-%d %H:%M:%S")
        if abs(age.total_seconds()) < WAITING_SECONDS:
            return True
        task["status"] = "ERROR"
        logger.warning(
            "the training that was asked for at %s has no process: the system started none within %g s. Free some "
            "memory, or allow more processes (ulimit -u; TasksMax of systemd). The schedule tries again by itself, at "
            "most %d times a night; what a person has asked for must be asked for again",
            task["start_ts"],
            WAITING_SECONDS,
            MOST_STARTS,
        )
    return False
