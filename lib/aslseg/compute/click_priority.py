"""Who computes now: work that is done ahead stands still, even within a slice, while a click is answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_thread = threading.local()


class ClickPriority:
    """Clicks and work done ahead, each in threads of their own.

    Work done ahead stands still from its next :func:`give_way` on, but not while a click waits for something that it
    has begun (:func:`awaiting`, :func:`held`): that click only sleeps.

    Attributes:
        changed: Notified when a click comes, waits or is answered. Guards the counts.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._now: Counter[str] = Counter()

    @property
    def clicks(self) -> int:
        """How many clicks are being answered."""
        return self._now["click"]

    @contextmanager
    def click(self) -> Iterator[None]:
        """In here a click is answered."""
        with self._counted("click"), _thread_is(self, "click"):
            yield

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """In here work is done ahead."""
        with _thread_is(self, "ahead"):
            yield

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """In here a click waits for work done ahead."""
        with self._counted("awaiting"):
            yield

    def wait_for_clicks(self) -> None:
        """Return once no click is being answered, or one waits."""
        with self.changed:
            self.changed.wait_for(lambda: not self.clicks or self._now["awaiting"])

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        with self.changed:
            self._now[what] += 1
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self._now[what] -= 1
                self.changed.notify_all()


@contextmanager
def _thread_is(turns: ClickPriority, role: str) -> Iterator[None]:
    before = getattr(_thread, "is_", None)
    _thread.is_ = (turns, role)
    try:
        yield
    finally:
        _thread.is_ = before


def yield_to_clicks() -> None:
    """Where work done ahead may stand still; nothing in any other thread. The encoder comes here before every block."""
    turns, role = getattr(_thread, "is_", None) or (None, "")
    if turns is not None and role == "ahead":
        begun = time.perf_counter()
        turns.wait_for_clicks()
        _thread.stood = getattr(_thread, "stood", 0.0) + time.perf_counter() - begun


def clock() -> float:
    """``time.perf_counter()`` without the time that this thread has stood still."""
    return time.perf_counter() - getattr(_thread, "stood", 0.0)


@contextmanager
def awaiting() -> Iterator[None]:
    """Around whatever may wait for another thread's embedding or answer."""
    turns, role = getattr(_thread, "is_", None) or (None, "")
    if turns is None or role == "ahead":
        yield
    else:
        with turns.awaiting():
            yield


@contextmanager
def held(lock: threading.Lock) -> Iterator[None]:
    """``with lock`` for a lock that work done ahead may hold while it stands still."""
    if not lock.acquire(blocking=False):
        with awaiting():
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
