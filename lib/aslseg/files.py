"""Files written atomically, and hashed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the umask can only be read by setting it, which two threads must not do at once
_UMASK = threading.Lock()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success fsync it and rename it to ``path``.

    The folder is made if missing. On any failure the temporary file is removed and ``path`` is as before.
    The temporary name keeps the extension and starts with a dot, so that a datastore does not list it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    suffix = name[name.index(".", 1) :] if "." in name[1:] else ""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # mkstemp is private to the user; a studies folder is often shared by a group
        with _UMASK:
            umask = os.umask(0o077)
            os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        Path(temporary).unlink(missing_ok=True)


@dataclass(frozen=True)
class FileStamp:
    """Which file lies at a path: a file that was replaced or written again has another stamp.

    Attributes:
        mtime_ns: When its content was last changed. Two changes within a tick of the file system's clock are one.
        size: Bytes.
        inode: Another file that was renamed to the same path has another one.
        ctime_ns: As ``mtime_ns``, but no program can set it back.
    """

    mtime_ns: int
    size: int
    inode: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp | None:
        """The stamp of a file; None if there is none."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return cls(found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
