"""The JSON file of a datastore written behind: a change is durable in the log at once, so that a request costs O(1)."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel

from aslseg.cases.studies import FINAL
from aslseg.files import FileStamp, sync_to_disk, write_errors
from aslseg.serving.change_log import IMAGE, Change, ChangeLog, stamp_text
from aslseg.serving.shared_json import SharedJsonFile, rotate
from aslseg.serving.studies_folder import StudiesFolder
from aslseg.serving.write_behind import WriteBehind

logger = logging.getLogger(__name__)

PIECE, PAUSE_SECONDS = 100, 0.001
"""After so many entries are made ready to be written, requests have their turn."""


@dataclass(frozen=True)
class Members:
    """Which scans there are, counted once for every change of that; nobody changes the lists.

    Attributes:
        revision: Grows with every change.
        labelled: Ids with a human label, sorted.
        unlabelled: The others, sorted.
        tags: Number of labels of each tag.
    """

    revision: int = -1
    labelled: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)


class LoggedJsonFile(SharedJsonFile):
    """A :class:`SharedJsonFile` that is written by a thread; :meth:`_changed` appends to a log before it returns.

    Whoever starts later, also after a kill, reads the JSON and applies what was appended since it was written. Two
    processes apply each other's changes; the JSON is read again only if a program of somebody else wrote it.
    """

    def _open_log(self, root: Path) -> None:
        """To be called before LocalDatastore's ``__init__``."""
        self._log = ChangeLog(self.paths.home / "datastore.sqlite")
        self._applied, self._log_stamp = 0, self._log.stamp()
        self._texts: dict[str, tuple[ImageLabelModel, str]] = {}
        self._revision, self._members = 0, Members()
        self._folder = StudiesFolder(root, root / "datastore_v2.json", lambda: self._loaded_stamp)
        self._behind = WriteBehind(self._write_now, lambda: root.is_dir() and not self._log.closed)

    def require_folder(self) -> None:
        self._folder.require()

    def flush(self) -> None:
        """Write the JSON file now if it is behind."""
        self._behind.flush()

    def members(self) -> Members:
        """Which scans have a human label, as far as is known without looking at the disk."""
        found, revision = self._members, self._revision
        if found.revision != revision:
            tags: dict[str, int] = {}
            groups: tuple[list[str], list[str]] = ([], [])
            for case, entry in self._datastore.objects.items():
                groups[FINAL not in entry.labels].append(case)
                for tag in entry.labels:
                    tags[tag] = tags.get(tag, 0) + 1
            found = self._members = Members(revision, *groups, tags)
        return found

    def _stale(self) -> bool:
        """Whether files, JSON or log have changed since they were last looked at."""
        path = Path(self._datastore_config_path)
        if self._listing is None or self._listing.stale() or self._log.stamp() != self._log_stamp:
            return True
        return FileStamp.of(path) not in (None, self._loaded_stamp)

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Read what others have written: their JSON only if it is not one of ours, else their changes."""
        with self._exclusive():
            self._log_stamp = self._log.stamp()
            stamp, (ours, seq) = FileStamp.of(Path(self._datastore_config_path)), self._log.written()
            first, changes = self._loaded_stamp is None, self._log.after(self._applied)
            if not first and changes is not None and stamp_text(stamp) == ours:
                self._loaded_stamp = stamp
            before = self._datastore
            super()._init_from_datastore_file(throw_exception)
            if self._datastore is not before:
                changes = self._log.after(seq)
                if stamp_text(stamp) != ours:
                    self._behind.request()
            # all that is kept: without a JSON file, or where others went on for long while this process slept
            self._apply(self._log.kept() if changes is None or (first and stamp is None) else changes)

    def _recover_changes(self) -> None:
        self._apply(self._log.kept())

    def _apply(self, changes: Iterable[Change]) -> None:
        """Put changes of the log into the entries; the files decide afterwards whether they still hold."""
        changed: dict[str, ImageLabelModel | None] = {}
        for change in changes:
            old = changed[change.case] if change.case in changed else self._datastore.objects.get(change.case)
            if change.tag == IMAGE and change.entry is None:
                changed[change.case] = None  # at once: the next look at the disk may have to wait for a writer
                continue
            image, labels = (old.image, old.labels) if old else (DataModel(), {})
            if change.tag == IMAGE:
                image = change.entry or image
            else:
                labels = {t: e for t, e in labels.items() if t != change.tag}
                if change.entry is not None:
                    labels[change.tag] = change.entry
            changed[change.case] = ImageLabelModel(image=image, labels=labels)
        if changed:
            self._put(changed)
            self._unplaced |= changed.keys()
            self._behind.request()
        self._applied = self._log.last()

    def _use(self, model: LocalDatastoreModel) -> None:
        super()._use(model)
        self._revision += 1

    def _put(self, changed: dict[str, ImageLabelModel | None]) -> None:
        before = self._datastore.objects
        same = all(e and c in before and e.labels.keys() == before[c].labels.keys() for c, e in changed.items())
        super()._put(changed)
        if not same:
            self._revision += 1

    @contextmanager
    def _changed(self) -> Iterator[list[Change]]:
        """Look at the disk again, then append what the block puts into the list: on disk when this ends, or not at all.

        Raises:
            RefusedError: 503, another process holds the lock; 422, an entry that JSON cannot hold.
        """
        with self._exclusive():
            self._reconcile_datastore()
            changes: list[Change] = []
            yield changes
            if changes:
                self._log.append(changes)
                self._apply(changes)
                self._log_stamp = self._log.stamp()

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._behind.request()

    def _write_now(self) -> None:
        self._init_from_datastore_file()
        self._write_json()

    def _write_json(self) -> None:
        """Write the JSON file; the lock is not held while the text is made and written."""
        path = Path(self._datastore_config_path)
        with self._exclusive():
            model, seq = self._datastore.model_copy(), self._applied
        self._make_texts(model)
        staged = path.with_name(f".tmp-{os.getpid()}-{threading.get_native_id()}-{path.name}")
        try:
            with write_errors(path):
                staged.write_text(self.json_text(model))
                sync_to_disk(staged)
                with self._exclusive():
                    self._replace_json(path, staged, seq)
        finally:
            staged.unlink(missing_ok=True)

    def _replace_json(self, path: Path, staged: Path, seq: int) -> None:
        if FileStamp.of(path) != self._loaded_stamp or self._log.written()[1] > seq:
            self._behind.request()  # somebody else has written it meanwhile
            return
        if path.exists():
            rotate(path)
        os.replace(staged, path)
        sync_to_disk(path.parent)
        self._loaded_stamp = FileStamp.of(path)
        self._log.set_written(self._loaded_stamp, seq)
        self._log_stamp = self._log.stamp()

    def prepare_text(self) -> None:
        """Make the text of each entry, so that :meth:`json_text` need not."""
        self._make_texts(self._datastore.model_copy())

    def _make_texts(self, model: LocalDatastoreModel) -> None:
        for number, (case, entry) in enumerate(list(model.objects.items())):
            self._entry_text(case, entry)
            if number % PIECE == 0:
                time.sleep(PAUSE_SECONDS)
        for case in list(self._texts):
            if case not in model.objects:
                self._texts.pop(case, None)

    def _entry_text(self, case: str, entry: ImageLabelModel) -> str:
        kept = self._texts.get(case)
        if kept is None or kept[0] is not entry:
            kept = self._texts[case] = (entry, super()._entry_text(case, entry))
        return kept[1]
