"""The image files of a studies folder by the id of their scan, listed again only where a folder has changed.

A look at folders that did not change costs one ``stat`` each. A change costs the names of that folder, which are
compared as sets: nothing is asked about files that were there before. That works on network disks too, without a
watcher thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from aslseg.cases.studies import is_utf8, possible_scans
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.links import trusted
from aslseg.volume.io import IMAGE_EXTENSIONS, case_id, extension

# Two changes within the clock tick of a file system leave the same modification time.
TICK_SECONDS = 0.1


class Watched:
    """Whether a folder may have changed since it was last listed.

    Args:
        folder: It may not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamp, self._since, self._settled = -1, 0.0, False

    def stale(self) -> bool:
        """Whether it must be listed again."""
        return not self._settled or self._mtime() != self._stamp

    def begin(self) -> None:
        """To be called before it is listed."""
        stamp, now = self._mtime(), time.monotonic()
        if stamp != self._stamp:
            self._stamp, self._since = stamp, now
        self._settled = now - self._since > TICK_SECONDS

    def _mtime(self) -> int:
        try:
            return self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return 0


class FolderListing(Watched):
    """The image files of one folder.

    Args:
        folder: Scans, or the labels of one tag.
        root: The studies folder; links in it must be made by its administrator, see :mod:`aslseg.serving.links`.

    Attributes:
        files: Case id to file name. Other kinds of files are left out, and of several files with one id the first.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        super().__init__(folder)
        self.root = root
        self.files: dict[str, str] = {}
        self._listed: set[str] = set()
        self._names: dict[str, set[str]] = {}

    def changed(self) -> set[str]:
        """List the folder if it is stale.

        Returns:
            Ids whose file has come, gone or been replaced by one of another name.
        """
        if not self.stale():
            return set()
        self.begin()
        listed = set(os.listdir(self.folder)) if self._stamp else set()
        touched = set()
        for name in listed - self._listed:
            path = self.folder / name
            if extension(path) is None or not is_utf8(name):
                continue
            if not self._usable(path):
                listed.discard(name)  # looked at again the next time: the disk behind a link may be mounted later
                continue
            case = case_id(path)
            self._names.setdefault(case, set()).add(name)
            touched.add(case)
        for name in self._listed - listed:
            case = case_id(Path(name))
            if name in self._names.get(case, ()):
                self._names[case].discard(name)
                touched.add(case)
        self._listed = listed
        return {case for case in touched if self._choose(case)}

    def names(self, case: str) -> list[str]:
        """All files of a case, also those that another one hides."""
        return sorted(self._names.get(case, ()))

    def _usable(self, path: Path) -> bool:
        return path.is_file() and (not path.is_symlink() or trusted(path, self.root))

    def _choose(self, case: str) -> bool:
        """Choose the file of a case; whether it is another than before."""
        before = self.files.get(case)
        if self._names[case]:
            self.files[case] = min(self._names[case])
        else:
            del self._names[case]
            self.files.pop(case, None)
        return self.files.get(case) != before


class ScanListing(FolderListing):
    """The scans of a studies folder, without the segmentations that lie among them."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, root)
        self._suspects: dict[str, tuple[str, ...]] = {}
        self._left_out: set[str] = set()

    def changed(self) -> set[str]:
        """As :meth:`FolderListing.changed`; a scan also decides about what looks like its segmentation."""
        touched = super().changed()
        for case in touched:
            self._suspects.pop(case, None)
            owners = possible_scans(self.files[case]) if case in self.files else ()
            if owners is None or owners:
                self._suspects[case] = owners or ()
        before = self._left_out
        if touched:
            self._left_out = {c for c, owners in self._suspects.items() if not owners or self.files.keys() & owners}
        return touched | (before ^ self._left_out)

    def scan(self, case: str) -> str | None:
        """The file of a scan; None for a segmentation and for an unknown id."""
        return None if case in self._left_out else self.files.get(case)


class SidecarListing(Watched):
    """What rounds wrote about their masks: a JSON file for each case.

    Attributes:
        stamps: Case id to modification time (ns).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stamps: dict[str, int] = {}

    def changed(self) -> set[str]:
        """Ids whose file has come, gone or been replaced."""
        if not self.stale():
            return set()
        self.begin()
        found = {}
        if self._stamp:
            with os.scandir(self.folder) as entries:
                found = {e.name[:-5]: e.stat().st_mtime_ns for e in entries if e.name.endswith(".json")}
        before, self.stamps = self.stamps, found
        return {case for case, _ in before.items() ^ found.items()}


def require_unused(root: Path, case: str) -> None:
    """Check that no file has the name of a scan that is not listed: a segmentation, a damaged link.

    Raises:
        RefusedError: 409, there is one.
    """
    found = next((f"{case}{e}" for e in IMAGE_EXTENSIONS if os.path.lexists(root / f"{case}{e}")), None)
    if found is not None:
        raise RefusedError(
            f"{found} lies in the studies folder already, though it is not listed as a scan; upload this one under "
            "another id",
            409,
        )


class StudiesListing:
    """Scans, labels of every tag, and sidecars of one studies folder.

    Args:
        root: The folder.
        home: Where rounds keep their sidecars, in ``original``.
    """

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        self.scans = ScanListing(root)
        self.sidecars = SidecarListing(home / "original")
        self._labels = Watched(root / "labels")
        self._tags: dict[str, FolderListing] = {}

    def stale(self) -> bool:
        """Whether anything may have changed."""
        return any(w.stale() for w in (self.scans, self.sidecars, self._labels, *list(self._tags.values())))

    def changed(self) -> set[str]:
        """Ids of the scans whose files, labels or sidecars have changed since the last call."""
        gone = self._list_tags()
        listings: Iterable[FolderListing | SidecarListing] = (self.scans, self.sidecars, *self._tags.values())
        return gone.union(*(listing.changed() for listing in listings))

    def label_names(self, case: str, tag: str) -> list[str]:
        """All label files of a case with a tag, as last listed."""
        return self._tags[tag].names(case) if tag in self._tags else []

    def labels(self, case: str) -> dict[str, str]:
        """Tag to label file of a case."""
        return {tag: listing.files[case] for tag, listing in self._tags.items() if case in listing.files}

    def _list_tags(self) -> set[str]:
        """Look for new and vanished tags; returns the ids that had a label in a vanished one."""
        if not self._labels.stale():
            return set()
        self._labels.begin()
        folders = {f.name: f for f in sorted((self.root / "labels").iterdir()) if f.is_dir() and f.name[0] != "."}
        found = {tag: folder for tag, folder in folders.items() if trusted(folder, self.root)}
        gone = {case for tag, listing in self._tags.items() if tag not in found for case in listing.files}
        self._tags = {tag: self._tags.get(tag) or FolderListing(folder, self.root) for tag, folder in found.items()}
        return gone
