"""Background work that pauses while anybody clicks: growing objects to their end, encoding the next slices."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch

from aslseg.compute.click_priority import ClickPriority, yield_to_clicks
from aslseg.serving.priority import AHEAD, lower_priority

logger = logging.getLogger(__name__)

MAX_JOBS = 16


class Background:
    """One thread that does small steps of the newest job, and none while a click is being answered.

    A step that encodes a slice pauses then, at the next block of an encoder that is known to :meth:`pause_in`. On
    Linux, where a thread has a priority of its own, it computes until there only when the processor has nothing else to
    do. A click that wants the same slice waits for it.

    The thread computes without helpers: while a second team of OpenMP threads exists, even an idle one, libgomp no
    longer lets those of the click spin between two operations (docs/clicks.md).
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[Callable[[], bool], object]] = deque(maxlen=MAX_JOBS)
        self._priority = ClickPriority()
        self._changed = self._priority.changed
        self._working = False
        self._pausing: WeakSet[torch.nn.Module] = WeakSet()
        threads, ready = torch.get_num_threads(), threading.Event()
        threading.Thread(target=self._run, args=(ready,), name="aslseg-background", daemon=True).start()
        ready.wait()
        torch.set_num_threads(threads)  # the number that the thread sets also counts for threads that start later

    def __len__(self) -> int:
        return len(self._jobs)

    def click(self) -> AbstractContextManager[None]:
        """A context in which no step begins, and one that has begun pauses where it can."""
        return self._priority.click()

    def pause_in(self, encoder: torch.nn.Module) -> None:
        """Let work with an encoder pause before each of its blocks; a second call does nothing."""
        if encoder not in self._pausing:
            self._pausing.add(encoder)
            for block in encoder.blocks:  # type: ignore[union-attr]
                block.register_forward_pre_hook(_yield)

    def add(self, step: Callable[[], bool], owner: object) -> None:
        """Add a job: a function that is called until it returns False. The newest job comes first.

        It replaces the job of the same ``owner`` that has not been finished. Of more than sixteen jobs the oldest is
        dropped: nobody waits for them.
        """
        with self._changed:
            for job in [j for j in self._jobs if j[1] is owner]:
                self._jobs.remove(job)
            self._jobs.append((step, owner))
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
                self._changed.wait_for(lambda: self._jobs and not self._priority.clicks)
                (step, owner), self._working = self._jobs.pop(), True
            try:
                with self._priority.background():
                    more = step()
            except Exception:  # a job that fails must not end the others
                logger.exception("work in the background failed")
                more = False
            if more:
                with self._changed:
                    self._jobs.append((step, owner))


def _yield(*_: Any) -> None:
    yield_to_clicks()
