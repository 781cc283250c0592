"""Files written atomically, and hashed."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import resource
import shutil
import tempfile
import threading
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aslseg.errors import DiskFullError, FileWriteError

DAMAGED = (
    *(OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""What NumPy raises on a file of arrays with wrong bytes, wherever these are.

A zip file that names an unknown compression gives NotImplementedError, one that calls itself encrypted RuntimeError,
and a broken header of an array SyntaxError or TokenError.
"""
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_BYTES = 1_000_000
"""Free bytes below which a writer that gives no error number is taken to have met a full disk."""
# the umask can only be read by setting it, which two threads must not do at once
_UMASK = threading.Lock()


def allow_open_files() -> None:
    """Let this process, and those that it starts, open as many files as the system permits.

    A memory-mapped array is an open file, and a round maps each scan; the usual 1024 are for programs that select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file into errors that say what to do.

    Raises:
        DiskFullError: The disk or the quota is full. Writers in C++ and Rust (torch.save, safetensors) hide the error
            number; theirs is recognised by the words or by the space that is left.
        FileWriteError: Any other error of the operating system.
    """
    try:
        yield
    except (DiskFullError, FileWriteError):
        raise
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(f"disk full while writing {path}; free some space and run again") from error
        reason = error.strerror or str(error) or type(error).__name__
        raise FileWriteError(f"{path} cannot be written ({reason}); check the disk and its permissions") from error
    except Exception as error:
        # safetensors asks for the whole file first, so that a disk that is too small for it still has space
        if any(f"(os error {number})" in str(error) for number in FULL) or nearly_full(path.parent):
            raise DiskFullError(f"disk full while writing {path}; free some space and run again") from error
        raise


def nearly_full(folder: Path) -> bool:
    """Whether a folder's disk has no space left to speak of; False where there is no such folder."""
    return folder.is_dir() and shutil.disk_usage(folder).free < FULL_BYTES


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success fsync it and rename it to ``path``.

    Args:
        path: The file.
        durable: Whether it must outlive a power cut, too; without, it outlives a kill of this process.

    The folder is made if missing. On any failure the temporary file is removed and ``path`` is as before.
    The temporary name keeps the extension and starts with a dot, so that a datastore does not list it.

    Raises:
        DiskFullError, FileWriteError: As :func:`write_errors`.
    """
    temporary: Path | None = None
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            suffix = path.name[path.name.index(".", 1) :] if "." in path.name[1:] else ""
            handle, created = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=suffix)
            os.close(handle)
            temporary = Path(created)
            yield temporary
            if durable:
                sync_to_disk(temporary)
            # mkstemp is private to the user; a studies folder is often shared by a group
            with _UMASK:
                umask = os.umask(0o077)
                os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
            if durable:
                sync_to_disk(path.parent)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Text of a small file that people edit, in the encoding in which Excel, Notepad or another editor saved it.

    A byte order mark decides; without one the text is UTF-16 where every other byte of its first line is zero, else
    UTF-8, else Windows-1252, the encoding of Excel's ``.csv`` in Western Europe.
    """
    raw = path.read_bytes()
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if raw.startswith(mark):
            return raw.decode(encoding, "replace")
    for encoding, zeros in (("utf-16-le", raw[1:32:2]), ("utf-16-be", raw[:32:2])):
        if zeros and not any(zeros):
            return raw.decode(encoding, "replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Write JSON atomically; ``durable`` as for :func:`atomic_file`.

    Raises:
        DiskFullError, FileWriteError: As :func:`write_errors`.
    """
    with atomic_file(path, durable) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def require_disk_budget(folder: Path, most_gb: float) -> None:
    """Check that the files in a folder take no more disk space than they may.

    Args:
        folder: With everything below it.
        most_gb: The limit in 10^9 bytes; 0 for none.

    Raises:
        DiskFullError: They take more.
    """
    if not most_gb:
        return
    used = sum(status.st_size for _, status in _files(folder)) / 1e9
    if used > most_gb:
        raise DiskFullError(
            f"{folder} takes {used:.1f} GB, but round_disk_gb allows {most_gb:g} GB; raise it, or delete "
            f"{folder / 'cache'}, which is made again"
        )


def temporary_files(*folders: Path, seconds: float = 0.0, deep: bool = True) -> Iterator[Path]:
    """Temporary files of :func:`atomic_file`.

    Args:
        folders: Where they lie; folders that are missing hold none.
        seconds: Only those that were written last longer ago; younger ones may belong to a process that writes now.
        deep: Whether the folders below these count, too.

    Yields:
        Their paths. Other processes may delete files and folders meanwhile.
    """
    for folder in folders:
        for path, status in _files(folder, deep):
            old = not seconds or time.time() - status.st_mtime > seconds
            if old and path.name.startswith(".tmp-"):
                yield path


def _files(folder: Path, deep: bool = True) -> Iterator[tuple[Path, os.stat_result]]:
    """Files in a folder with what the system says of them; what is deleted meanwhile is left out."""
    for parent, below, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with suppress(FileNotFoundError):
                yield path, path.lstat()
        if not deep:
            below.clear()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FileStamp:
    """What changes when a file is written again: times of the last changes (ns), size in bytes, inode."""

    mtime_ns: int
    ctime_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStamp | None:
        """The stamp of a file; None if it does not exist."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        return cls(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)


class FileHashes:
    """SHA-256 of files, each read once as long as its :class:`FileStamp` stays the same."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[FileStamp | None, str]] = {}

    def __call__(self, path: Path) -> str:
        """Hex SHA-256 of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        # before reading, so that a change meanwhile is seen the next time
        stamp = FileStamp.of(path)
        kept = self._known.get(path)
        if kept is None or kept[0] != stamp:
            kept = self._known[path] = (stamp, sha256(path))
        return kept[1]
