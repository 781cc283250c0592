"""What reading a scan gave: an error, or notes on a header that can be understood in more than one way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aslseg.errors import BadImageError
from aslseg.files import FileStamp
from aslseg.volume.io import read_header, read_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScanCheck:
    """What is known of one version of a file.

    Attributes:
        error: Why it cannot be read; None where it can.
        notes: What is unusual about its header and how it was understood.
        whole: Whether its voxels were read too, not only its header.
    """

    error: str | None = None
    notes: tuple[str, ...] = ()
    whole: bool = False


class ScanChecks:
    """Checks of scans, each made once for each version of a file. Safe to share between threads.

    Args:
        max_voxels: A scan with more is refused, as everywhere.
    """

    def __init__(self, max_voxels: float) -> None:
        self.max_voxels = max_voxels
        self._known: dict[Path, tuple[FileStamp | None, ScanCheck]] = {}
        self._lock = threading.Lock()

    def read(self, path: Path) -> ScanCheck:
        """Read a scan whole, unless that was done before."""
        known = self._find(path)
        if known is not None and (known.whole or known.error):
            return known
        return self._make(path, lambda: read_image(path, self.max_voxels).notes, whole=True)

    def look(self, path: Path) -> ScanCheck:
        """Read the header of a scan, unless that was done before."""
        return self._find(path) or self._make(path, lambda: read_header(path).notes, whole=False)

    def messages(self) -> list[str]:
        """What people should know of the scans that were checked and are still there; each message names its file."""
        with self._lock:
            known = [(path, *entry) for path, entry in self._known.items() if entry[1].error or entry[1].notes]
        found = []
        for path, stamp, check in sorted(known, key=lambda entry: entry[0]):
            if FileStamp.of(path) == stamp is not None:
                found += [f"{check.error}. It is not handed out"] if check.error else []
                found += [f"{path.name}: {note}" for note in check.notes]
        return found

    def _find(self, path: Path) -> ScanCheck | None:
        with self._lock:
            stamp, check = self._known.get(path, (None, None))
        return check if check is not None and stamp == FileStamp.of(path) else None

    def _make(self, path: Path, notes: Callable[[], tuple[str, ...]], whole: bool) -> ScanCheck:
        stamp = FileStamp.of(path)
        try:
            check = ScanCheck(notes=notes(), whole=whole)
        except BadImageError as error:
            check = ScanCheck(error=str(error))
            logger.warning("not handed out: %s", error)
        with self._lock:
            self._known[path] = (stamp, check)
        return check
