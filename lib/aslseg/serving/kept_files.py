"""Files that nobody asked to keep and that are kept all the same: refused uploads, earlier labels, deleted files.

They lie in the folder ``home`` of the studies: ``parked``, ``versions`` and ``trash``. An administrator empties them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from requests import RequestException

from aslseg.errors import AslsegError, DiskFullError, FileWriteError, NoResourcesError
from aslseg.files import FULL, atomic_file, sync_to_disk, temporary_files, write_errors, write_json
from aslseg.serving.http_errors import pacs_error
from aslseg.volume.io import case_id, extension

logger = logging.getLogger(__name__)

STALE_SECONDS = 3600.0


class KeptFiles:
    """Refused uploads, earlier human labels, and deleted files of one studies folder.

    Args:
        home: ``Paths.home``.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def folders(self) -> list[Path]:
        """All folders in which files are kept."""
        tops = [self.home / name for name in ("parked", "versions", "trash")]
        return [Path(folder) for top in tops for folder, _, _ in os.walk(top)]

    @contextmanager
    def parked(self, case: str, source: Path, info: dict[str, Any]) -> Iterator[None]:
        """Keep an upload before anything is decided about it; it goes when the block succeeds.

        Where the block fails, for any reason, or the server is killed in it, the upload stays in ``parked`` beside a
        JSON file with the reason, and the error says where. It is on the disk before the error is answered; a power cut
        in the block, which leaves the sender without an answer, may take it.

        Args:
            case: Id of the scan.
            source: The upload.
            info: What came with it.

        Raises:
            DiskFullError: It cannot even be kept.
            NoResourcesError: The block ran out of memory.
            FileWriteError: The block met another error of the operating system.
        """
        name = f"{case}-{secrets.token_hex(4)}{extension(source) or '.bin'}"
        kept = self.home / "parked" / name
        copy_file(source, kept, durable=False)
        about = kept.with_name(f"{name}.json")
        described = {"case": case, "params": info}
        write_json(about, described | {"reason": "the server was stopped while it saved this label"}, durable=False)
        try:
            with answerable():
                yield
        except Exception as error:
            message = str(error).replace(str(source), "it").replace(source.name, f"of {case}").rstrip(".")
            with write_errors(kept):
                sync_to_disk(kept)
                sync_to_disk(kept.parent)
            try:
                write_json(about, described | {"reason": message})
            except AslsegError as other:  # as on a full disk: the upload is kept all the same
                logger.warning("the reason why %s is kept could not be written: %s", kept.name, other)
            if isinstance(error, AslsegError):
                error.args = (f"{message}. Your upload is kept as {kept.relative_to(self.home)}",)
            raise
        kept.unlink(missing_ok=True)
        about.unlink(missing_ok=True)

    def keep_version(self, case: str, path: Path, info: dict[str, Any]) -> None:
        """Keep a label that is about to be replaced, with its info."""
        kept = self.home / "versions" / case / f"{time.time_ns()}{extension(path) or ''}"
        copy_file(path, kept)
        write_json(kept.with_name(f"{case_id(kept)}.json"), _plain(info))

    def trash_path(self, case: str, tag: str, path: Path) -> Path:
        """Where a deleted file goes."""
        return self.home / "trash" / case / f"{time.time_ns()}-{tag}{extension(path) or ''}"

    def discard(self, path: Path, target: Path, about: dict[str, Any]) -> None:
        """Move a deleted file to its place in the trash, with a JSON file that says who deleted it and when."""
        write_json(target.with_name(f"{case_id(target)}.json"), _plain(about))
        try:
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:  # another disk
                raise
            copy_file(path, target)
            path.unlink()
        sync_to_disk(target.parent)
        sync_to_disk(path.parent)


@contextmanager
def answerable() -> Iterator[None]:
    """Turn what the operating system refuses in the block into errors whose messages may be answered.

    Raises:
        DiskFullError, FileWriteError, NoResourcesError: In place of another error of the operating system.
    """
    try:
        yield
    except Exception as problem:
        error = _answerable(problem)
        if error is problem:
            raise
        raise error from problem


def _answerable(problem: Exception) -> Exception:
    """What stopped an upload as an error whose message may be answered, if it is not a fault of this program."""
    if isinstance(problem, AslsegError):
        return problem
    if isinstance(problem, MemoryError):
        return NoResourcesError("the server has not enough memory to save this now; send it again later")
    if isinstance(problem, RequestException):  # an OSError too, but not of the disk
        return pacs_error(problem)
    if isinstance(problem, OSError):
        reason = problem.strerror or type(problem).__name__
        if problem.errno in FULL:
            return DiskFullError("a disk of the server is full; free some space there and send it again")
        return FileWriteError(f"the server could not read or write a file for this ({reason}); check its disk")
    return problem


def remove_stale_temporaries(*folders: Path) -> None:
    """Delete temporary files that a killed process left; younger ones may belong to a process that writes now."""
    for path in temporary_files(*folders, seconds=STALE_SECONDS, deep=False):
        path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path, durable: bool = True) -> None:
    """Copy a file atomically; ``durable`` as for :func:`aslseg.files.atomic_file`."""
    with atomic_file(target, durable) as temporary:
        shutil.copyfile(source, temporary)


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(info, default=str)))
