"""The JSON file of MONAI Label's datastore, shared by several writers, that survives kills and damage."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel

from aslseg.cases.studies import ORIGINAL, PSEUDO
from aslseg.files import FileStamp, atomic_file
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.listing import StudiesListing
from aslseg.serving.lock_holder import describe_holder
from aslseg.settings import Paths, Settings
from aslseg.volume.io import case_id

logger = logging.getLogger(__name__)

LOCK_SECONDS = 10.0
POLL_SECONDS = 0.003  # the default of 50 ms lets a process that writes a lot starve the others
BACKUPS = (".bak", ".bak1", ".bak2", ".bak3", ".bak4")
GENERATION_SECONDS = 3600.0


class SharedJsonFile:
    """The JSON file of a LocalDatastore: read again if another process wrote it, replaced atomically, recoverable.

    A mixin that stands before a LocalDatastore. ``settings`` and ``paths`` must be set before its ``__init__``.

    Attributes:
        recovered: What was recovered after damage, for the people who use the server; empty if nothing was.
    """

    settings: Settings
    paths: Paths
    recovered: str
    _datastore: LocalDatastoreModel
    _datastore_config_path: str
    _datastore_path: str
    _lock_file: str

    def _prepare_guard(self, settings: Settings, paths: Paths) -> None:
        self.settings, self.paths = settings, paths
        self.recovered = ""
        self._mutex = threading.RLock()
        self._file_lock: FileLock | None = None
        self._loaded_stamp: FileStamp | None = None
        self._listing: StudiesListing | None = None
        self._unplaced: set[str] = set()
        self._all_placed = False

    def require_folder(self) -> None:
        """Check that files are written where they were at the start; nothing to check where scans are in a PACS."""

    @contextmanager
    def _exclusive(self, seconds: float | None = None) -> Iterator[None]:
        """One writer at a time, over threads and processes; may be nested.

        Args:
            seconds: How long to wait for another writer; by default 10 s.

        Raises:
            RefusedError: 503, another writer holds the lock; the message names it. Or as :meth:`require_folder`.
        """
        self.require_folder()  # the lock is a file in the folder
        seconds = LOCK_SECONDS if seconds is None else seconds
        if not self._mutex.acquire(timeout=seconds):
            raise RefusedError(f"another request keeps the datastore busy for over {seconds:g} s; try again", 503)
        try:
            if self._file_lock is None:
                self._file_lock = FileLock(self._lock_file)
            try:
                held = self._file_lock.acquire(timeout=seconds, poll_interval=POLL_SECONDS)
            except Timeout:
                who = describe_holder(Path(self._lock_file))
                raise RefusedError(
                    f"the datastore has been locked for over {seconds:g} s by {who}; nothing was changed. Wait for "
                    "that process or stop it, and try again",
                    503,
                ) from None
            with held:
                yield
        finally:
            self._mutex.release()

    def require_unlocked(self) -> None:
        """Try the lock.

        Raises:
            RefusedError: 503, another writer holds it now; the message names it.
        """
        with self._exclusive(1.0):
            pass

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        path = Path(self._datastore_config_path)
        with self._exclusive():
            stamp = FileStamp.of(path)
            if stamp is None and self._loaded_stamp is None and self._backups():
                self._recover(path)
            elif stamp is None or stamp == self._loaded_stamp:
                return
            else:
                model = parse(path)
                if model is None:
                    self._recover(path)
                else:
                    self._use(model)
                    self._loaded_stamp = stamp

    def _use(self, model: LocalDatastoreModel) -> None:
        model.base_path, model.images_dir, model.labels_dir = self._datastore_path, ".", "labels"
        model.objects = {k: v for k, v in model.objects.items() if k == os.path.basename(k) and k[:1] != "."}
        self._datastore, self._all_placed = model, False

    def _backups(self) -> list[Path]:
        """Earlier versions of the file, newest first."""
        path = Path(self._datastore_config_path)
        return [p for p in (path.with_name(f"{path.name}{ending}") for ending in BACKUPS) if p.exists()]

    def _recover(self, path: Path) -> None:
        """Go on with the newest backup that can be read, else with the files alone; say so."""
        damaged = "missing"
        if path.exists():
            kept = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            os.replace(path, kept)
            self._loaded_stamp = None
            damaged = f"damaged (kept as {kept.name})"
        models = ((backup, parse(backup)) for backup in self._backups())
        backup, model = next(((b, m) for b, m in models if m is not None), (None, None))
        source = f"its backup {backup.name}" if backup else "the label files and the ledger"
        self._use(model or LocalDatastoreModel(name="new-dataset", description="New Dataset"))
        self._recover_changes()
        self.recovered = (
            f"{path.name} was {damaged} on {time.strftime('%Y-%m-%d %H:%M')}; it was recovered from {source}"
        )
        logger.error("%s", self.recovered)
        self._write_json()

    def _recover_changes(self) -> None:
        """Add what is newer than a backup, where that is kept."""

    def _update_datastore_file(self, lock: bool = True) -> None:
        if lock:
            with self._exclusive():
                self._write_json()
        else:
            self._write_json()

    def _write_json(self) -> None:
        """Replace the file, after checking that what is written can be read again.

        Raises:
            RefusedError: 422, it could not be read again; nothing is written.
        """
        path = Path(self._datastore_config_path)
        with atomic_file(path) as temporary:
            temporary.write_text(self.json_text())
            if path.exists():
                rotate(path)
        self._loaded_stamp = FileStamp.of(path)

    def json_text(self, model: LocalDatastoreModel | None = None) -> str:
        """The content of the file: one line a scan.

        Args:
            model: What is written instead of what there is now.

        Raises:
            RefusedError: 422, something in it could not be read again.
        """
        model = model or self._datastore
        head = json.dumps({k: getattr(model, k) for k in ("name", "description", "images_dir", "labels_dir")}, indent=1)
        entries = ",\n".join(self._entry_text(case, entry) for case, entry in model.objects.items())
        return f'{head[:-2]},\n "objects": {{\n{entries}\n}}}}\n'

    def _entry_text(self, case: str, entry: ImageLabelModel) -> str:
        text = json.dumps(entry.model_dump(), default=str)
        try:
            ImageLabelModel.model_validate_json(text)
        except ValueError:
            raise RefusedError("params: hold a value that JSON cannot store; nothing was saved", 422) from None
        return f"{json.dumps(case)}: {text}"

    def _to_id(self, file: str) -> tuple[str, str]:
        found = case_id(Path(file))
        return found, os.path.basename(file)[len(found) :]

    def _reconcile_datastore(self) -> None:
        """Make the JSON agree with the files: files win, their info is kept or taken from the records of its writer."""
        with self._exclusive():
            if self._listing is None:
                self._listing = StudiesListing(Path(self._datastore_path), self.paths.home)
            self._init_from_datastore_file()
            self._unplaced |= self._listing.changed()
            self.require_folder()  # what was listed may be the empty place of a disk that has just gone
            if not self._all_placed:
                self._unplaced |= self._datastore.objects.keys() | self._listing.scans.files.keys()
            placed = {case: self._placed(case, self._listing) for case in self._unplaced}
            objects = self._datastore.objects
            changed = {case: entry for case, entry in placed.items() if entry is not objects.get(case)}
            if changed:
                self._put(changed)
                self._update_datastore_file(lock=False)
            self._unplaced, self._all_placed = set(), True

    def _placed(self, case: str, listing: StudiesListing) -> ImageLabelModel | None:
        """What is known about a scan, for the files that are there now: its old entry if that says the same."""
        name, old = listing.scans.scan(case), self._datastore.objects.get(case)
        if name is None:
            return None
        image = old.image if old and case + old.image.ext == name else new_entry(case, name)
        kept = old.labels if old else {}
        files = listing.labels(case)
        labels = {tag: self._entry_of(case, tag, files[tag], kept.get(tag)) for tag in files}
        if old and image is old.image and labels == kept:
            return old
        return ImageLabelModel(image=image, labels=labels)

    def _put(self, changed: dict[str, ImageLabelModel | None]) -> None:
        """Replace the entries of some scans; None takes one out. Other threads may be walking through the entries."""
        objects = self._datastore.objects
        if all(entry is not None and case in objects for case, entry in changed.items()):
            objects.update(changed)
        else:
            merged = {**objects, **changed}
            self._datastore.objects = {case: e for case in sorted(merged) if (e := merged[case]) is not None}

    def _entry_of(self, case: str, tag: str, name: str, old: DataModel | None) -> DataModel:
        """The entry of a label file: the old one while it describes this file, else a new one."""
        if tag not in (ORIGINAL, PSEUDO):
            return old if old and case + old.ext == name else self._new_label_entry(case, tag, name)
        stamp = self._listing.sidecars.stamps.get(case, 0) if self._listing else 0
        if old and case + old.ext == name and old.info.get("sidecar", 0) == stamp:
            return old
        entry = self._new_label_entry(case, tag, name)
        entry.info.update(self._read_sidecar(case), sidecar=stamp)
        # Slicer takes the names of a stored mask from here, in this order.
        entry.info.setdefault("params", {}).setdefault("label_names", self.settings.label_set.values)
        return entry

    def _new_label_entry(self, case: str, tag: str, name: str) -> DataModel:
        """The entry of a label file that the JSON does not know."""
        return new_entry(case, name)

    def _sidecar_path(self, case: str) -> Path:
        return self.paths.home / "original" / f"{case}.json"

    def _read_sidecar(self, case: str) -> dict[str, Any]:
        """What a round wrote about its mask."""
        try:
            return dict(json.loads(self._sidecar_path(case).read_text()))
        except (OSError, ValueError, TypeError):
            return {}


def parse(path: Path) -> LocalDatastoreModel | None:
    try:
        return LocalDatastoreModel.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def rotate(path: Path) -> None:
    """Keep the version before the next one, and once an hour one more generation."""
    newest, *older = (path.with_name(f"{path.name}{ending}") for ending in BACKUPS)
    first = FileStamp.of(older[0])
    if newest.exists() and (first is None or time.time() - first.mtime_ns / 1e9 > GENERATION_SECONDS):
        for old, young in zip(reversed(older), reversed([newest, *older[:-1]]), strict=True):
            if young.exists():
                os.replace(young, old)
    temporary = newest.with_name(f".tmp-{newest.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # the file is only ever replaced, so a second name keeps it as it is
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, newest)


def new_entry(case: str, name: str) -> DataModel:
    """An entry that says no more than when the file was first seen."""
    return DataModel(info={"ts": int(time.time()), "name": name}, ext=name[len(case) :])
