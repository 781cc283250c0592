"""Whether the studies folder is still the one that the server was started with.

While a disk is away, its place is empty or missing. A server that took this for the truth would forget what people
wrote about their scans, and save labels where nobody sees them once the disk is back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aslseg.files import FileStamp
from aslseg.serving.http_errors import RefusedError


class StudiesFolder:
    """The studies folder as it was at the start.

    Args:
        root: The folder; it exists.
        json: The datastore's file in it.
        known: The stamp of that file when this process last read or wrote it. A network disk may come back with other
            numbers for the same folder; the file then shows that it is the same.
    """

    def __init__(self, root: Path, json: Path, known: Callable[[], FileStamp | None]) -> None:
        self.root, self.json, self.known = root, json, known
        self._identity = _identity(root)

    def require(self) -> None:
        """Check that the folder and its labels are there.

        Raises:
            RefusedError: 503, they are not, or there is another folder in its place.
        """
        found = _identity(self.root)
        if found is None:
            raise _away("the studies folder is not there")
        if found != self._identity:
            if not self._same_json():
                raise _away("the studies folder is another one than at the start")
            self._identity = found
        if not (self.root / "labels").is_dir():
            raise _away("the folder 'labels' of the studies folder is not there")

    def _same_json(self) -> bool:
        now, known = FileStamp.of(self.json), self.known()
        return now is not None and known is not None and (now.mtime_ns, now.size) == (known.mtime_ns, known.size)


def _away(reason: str) -> RefusedError:
    return RefusedError(
        f"{reason}: nothing was changed, and nothing that was sent is kept. Mount its disk again, then send it again; "
        "where the folder was replaced on purpose, restart the server",
        503,
    )


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode; None where it is missing."""
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
