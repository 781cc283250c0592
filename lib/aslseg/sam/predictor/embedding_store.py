"""Embeddings on disk: half-precision .npy files, one for each slice, of which the least recently used are deleted."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

from aslseg.files import atomic_file

logger = logging.getLogger(__name__)

KEPT_FRACTION = 0.9  # of the limit is left once it was exceeded, so that few writes have to list the folder


class EmbeddingStore:
    """A folder of files that several processes may share; each file is written atomically.

    With a full disk or a damaged file the slice is encoded again, and the click is answered.

    Args:
        folder: Created when first needed.
        limit: Bytes beyond which the least recently read files are deleted.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._bytes: int | None = None

    def read(self, name: str) -> np.ndarray | None:
        """A memory-mapped float16 array (C, grid, grid), or None."""
        path = self._path(name)
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s is damaged (%s); its slice is encoded again", path.name, error)
            with suppress(OSError):
                path.unlink()
            return None
        # the file of another user can be read, but its time cannot be set
        with suppress(OSError):
            os.utime(path)
        return found if found.dtype == np.float16 and found.ndim == 3 else None

    def has(self, name: str) -> bool:
        """Whether there is a file."""
        return self._path(name).exists()

    def write(self, name: str, embedding: np.ndarray) -> None:
        """Keep an embedding (C, grid, grid) in half precision."""
        path = self._path(name)
        try:
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, embedding.astype(np.float16, copy=False), allow_pickle=False)
        except OSError as error:
            logger.warning("an embedding could not be written: %s", error)
            return
        with self._lock:
            self._bytes = sum(size for _, size, _ in self._files()) if self._bytes is None else self._bytes
            with suppress(OSError):
                self._bytes += path.stat().st_size
            if self._bytes > self.limit:
                self._evict()

    def _evict(self) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= KEPT_FRACTION * self.limit:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
        self._bytes = total

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file; those that another process deletes meanwhile are left out."""
        found = []
        for path in self.folder.glob("*/*.npy"):
            try:
                stat = path.stat()
            except OSError:
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.npy"
