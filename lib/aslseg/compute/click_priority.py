"""Clicks come first: work in the background pauses, even within a slice, while a click is answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


class ClickPriority:
    """Counts the clicks that are being answered, and pauses background work meanwhile; each runs in its own threads.

    Background work pauses at its next :func:`yield_to_clicks`. It goes on where a click waits for something that the
    background has begun (:func:`waiting_for_background`, :func:`acquire`): that click only sleeps.

    Attributes:
        changed: Notified when a click comes, waits or is answered. Guards the counts.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._counts: Counter[str] = Counter()

    @property
    def clicks(self) -> int:
        """How many clicks are being answered."""
        return self._counts["click"]

    @contextmanager
    def click(self) -> Iterator[None]:
        """Within this context the thread answers a click."""
        with self._counted("click"), _thread_role(self, "click"):
            yield

    @contextmanager
    def background(self) -> Iterator[None]:
        """Within this context the thread works in the background."""
        with _thread_role(self, "background"):
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within this context a click waits for background work."""
        with self._counted("waiting"):
            yield

    def wait_for_clicks(self) -> None:
        """Return once no click is being answered, or one waits for background work."""
        with self.changed:
            self.changed.wait_for(lambda: not self.clicks or self._counts["waiting"])

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        with self.changed:
            self._counts[what] += 1
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self._counts[what] -= 1
                self.changed.notify_all()


@contextmanager
def _thread_role(priority: ClickPriority, role: str) -> Iterator[None]:
    before = getattr(_thread, "role", None)
    _thread.role = (priority, role)
    try:
        yield
    finally:
        _thread.role = before


def yield_to_clicks() -> None:
    """Pause background work while a click is answered. In all other threads this does nothing."""
    priority, role = getattr(_thread, "role", None) or (None, "")
    if priority is not None and role == "background":
        start = time.perf_counter()
        priority.wait_for_clicks()
        _thread.paused = getattr(_thread, "paused", 0.0) + time.perf_counter() - start


def computing_time() -> float:
    """``time.perf_counter()`` without the seconds for which this thread was paused."""
    return time.perf_counter() - getattr(_thread, "paused", 0.0)


@contextmanager
def waiting_for_background() -> Iterator[None]:
    """Around code of a click that may wait for an embedding or a mask that a background thread computes."""
    priority, role = getattr(_thread, "role", None) or (None, "")
    if priority is None or role == "background":
        yield
    else:
        with priority.waiting():
            yield


@contextmanager
def acquire(lock: threading.Lock) -> Iterator[None]:
    """``with lock``, for a lock that a background thread may hold while it is paused."""
    if not lock.acquire(blocking=False):
        with waiting_for_background():
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
