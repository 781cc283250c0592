"""A cache that is bounded by the memory of its values."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLRU(Generic[K, V]):
    """Forgets its least recently used entries past a byte limit. The newest entry always stays. Safe between threads.

    Args:
        limit: Bytes that all values together may take.
        size: Bytes of all values together. It is asked again at every insertion, because values may grow after they
            were put in, and may share memory that counts once.
    """

    def __init__(self, limit: float, size: Callable[[Collection[V]], int]) -> None:
        self.limit, self._size = limit, size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        with self._lock:
            return key in self._entries

    @property
    def bytes(self) -> int:
        """Bytes that the values take now."""
        return self._size(self.values())

    def keys(self) -> list[K]:
        """All keys, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def values(self) -> list[V]:
        """All values, the least recently used first."""
        with self._lock:
            return list(self._entries.values())

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used one, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: K, value: V) -> None:
        """Insert or replace a value as the most recently used one."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > 1 and self._size(self._entries.values()) > self.limit:
                self._entries.popitem(last=False)

    def pop(self, key: K) -> V | None:
        """Remove a value and return it, or None."""
        with self._lock:
            return self._entries.pop(key, None)
