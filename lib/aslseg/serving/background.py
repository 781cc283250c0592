"""Work that waits while anybody clicks: growing objects to their end, encoding the slices that come next."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from aslseg.compute.click_priority import ClickPriority
from aslseg.serving.priority import AHEAD, lower_priority

logger = logging.getLogger(__name__)

MOST_JOBS = 16


class Background:
    """One thread that does small steps of the newest job, and none while a click is being answered.

    A step that encodes a slice stands still then, at the next block of the encoder; on Linux, where a thread can have a
    priority of its own, it gets until there what the click leaves. A click that wants just that slice waits for it.

    It computes without helpers: while a second team of OpenMP threads exists, even an idle one, libgomp no longer lets
    those of the click wait awake, and the click's encoder pass takes a sixth longer (docs/results.md).
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[Callable[[], bool], object]] = deque(maxlen=MOST_JOBS)
        self._turns = ClickPriority()
        self._changed = self._turns.changed
        self._working = False
        threads, ready = torch.get_num_threads(), threading.Event()
        threading.Thread(target=self._run, args=(ready,), name="aslseg-background", daemon=True).start()
        ready.wait()
        torch.set_num_threads(threads)  # what that thread said counts for threads to come as well

    def click(self) -> AbstractContextManager[None]:
        """While this is open no step begins, and one that has begun stands still where it can."""
        return self._turns.click()

    def add(self, step: Callable[[], bool], whose: object) -> None:
        """Add a job: called again and again until it says that there is no more. The newest comes first.

        It takes the place of the job that the same object ``whose`` has waiting. Of more than sixteen the oldest is
        dropped: it is only ever work done ahead.
        """
        with self._changed:
            for job in [j for j in self._jobs if j[1] is whose]:
                self._jobs.remove(job)
            self._jobs.append((step, whose))
            self._changed.notify_all()

    def idle(self, seconds: float) -> bool:
        """Wait until nothing is left to do; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._working, seconds)

    def _run(self, ready: threading.Event) -> None:
        lower_priority(AHEAD)
        torch.get_num_threads()  # otherwise torch's first operation in this thread undoes the next line
        torch.set_num_threads(1)
        ready.set()
        while True:
            with self._changed:
                self._working = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs and not self._turns.clicks)
                (step, whose), self._working = self._jobs.pop(), True
            try:
                with self._turns.ahead():
                    more = step()
            except Exception:  # a job ahead of time must not end those of others
                logger.exception("work in the background failed")
                more = False
            if more:
                with self._changed:
                    self._jobs.append((step, whose))
