"""Values of a function of a number, computed ahead in threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
THREADS = 3


class Prefetched(Generic[T]):
    """A function of a number, whose next values are computed while the caller uses the last one.

    Args:
        function: Called from several threads at once; depends on nothing but its argument.
        stride: From one number that is asked for to the next. Any other number may be asked for as well.
        threads: That compute ahead.
    """

    def __init__(self, function: Callable[[int], T], stride: int = 1, threads: int = THREADS) -> None:
        self._function, self._stride, self._threads = function, stride, threads
        self._pool = ThreadPoolExecutor(threads, "prefetch")
        self._ahead: dict[int, Future[T]] = {}

    def __call__(self, number: int) -> T:
        """The function's value; what it raises is raised here."""
        wanted = [number + n * self._stride for n in range(self._threads + 1)]
        self._ahead = {n: self._ahead.get(n) or self._pool.submit(self._function, n) for n in wanted}
        return self._ahead.pop(number).result()
