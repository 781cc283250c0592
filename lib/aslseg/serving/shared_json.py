"""The JSON file of MONAI Label's datastore: several writers, killed processes and half-written files survived."""

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

from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel

from aslseg.cases.studies import ORIGINAL, PSEUDO, without_segmentations
from aslseg.files import atomic_file
from aslseg.settings import Paths, Settings
from aslseg.volume.io import case_id, extension

logger = logging.getLogger(__name__)


class SharedJsonFile:
    """The JSON file of a LocalDatastore: read again if another process wrote it, replaced atomically, recoverable.

    A mixin that stands before a LocalDatastore. ``settings`` and ``paths`` must be set before its ``__init__``.
    """

    settings: Settings
    paths: Paths
    _datastore: LocalDatastoreModel
    _datastore_config_path: str
    _datastore_path: str
    _lock_file: str

    def _prepare_guard(self, settings: Settings, paths: Paths) -> None:
        self.settings, self.paths = settings, paths
        self._mutex = threading.RLock()
        self._file_lock: FileLock | None = None
        self._signature: tuple[int, ...] | None = None

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One writer at a time, over threads and processes; may be nested."""
        with self._mutex:
            if self._file_lock is None:
                self._file_lock = FileLock(self._lock_file)
            # the default of 50 ms lets a process that writes a lot starve the others
            with self._file_lock.acquire(poll_interval=0.003):
                yield

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        path = Path(self._datastore_config_path)
        with self._exclusive():
            signature = _signature(path)
            if signature is None or signature == self._signature:
                return
            model = _parse(path)
            damaged = model is None
            if model is None:
                model = self._recover(path)
            model.base_path, model.images_dir, model.labels_dir = self._datastore_path, ".", "labels"
            model.objects = {k: v for k, v in model.objects.items() if k == os.path.basename(k) and k[:1] != "."}
            self._datastore = model
            self._signature = signature
            if damaged:
                self._write_json()

    def _recover(self, path: Path) -> LocalDatastoreModel:
        damaged = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        os.replace(path, damaged)
        backup = _parse(path.with_name(f"{path.name}.bak"))
        logger.error(
            "%s was damaged (kept as %s); recovered from %s",
            path,
            damaged.name,
            "its backup" if backup else "files",
        )
        return backup or LocalDatastoreModel(name="new-dataset", description="New Dataset")

    def _update_datastore_file(self, lock: bool = True) -> None:
        if lock:
            with self._exclusive():
                self._write_json()
        else:
            self._write_json()

    def _write_json(self) -> None:
        path = Path(self._datastore_config_path)
        text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        if path.exists():
            with atomic_file(path.with_name(f"{path.name}.bak")) as temporary:
                shutil.copyfile(path, temporary)
        with atomic_file(path) as temporary:
            temporary.write_text(text)
        self._signature = _signature(path)

    def _to_id(self, file: str) -> tuple[str, str]:
        found = case_id(Path(file))
        return found, os.path.basename(file)[len(found) :]

    def _reconcile_datastore(self) -> None:
        """Make the JSON agree with the files: files win, their info is kept or taken from a round's sidecar."""
        with self._exclusive():
            self._init_from_datastore_file()
            root = Path(self._datastore_path)
            images = listed(root)
            tags = {f.name: listed(f) for f in (root / "labels").iterdir() if f.is_dir() and f.name[0] != "."}
            before = self._datastore.objects
            objects = {}
            for case, name in without_segmentations(images).items():
                old = before.get(case)
                image = old.image if old and case + old.image.ext == name else new_entry(case, name)
                kept = old.labels if old else {}
                labels = {
                    t: self._adopt(case, t, files[case], kept.get(t)) for t, files in tags.items() if case in files
                }
                objects[case] = ImageLabelModel(image=image, labels=labels)
            if objects != before:
                self._datastore.objects = objects
                self._update_datastore_file(lock=False)

    def _adopt(self, case: str, tag: str, name: str, old: DataModel | None) -> DataModel:
        if tag not in (ORIGINAL, PSEUDO):
            return old if old and case + old.ext == name else new_entry(case, name)
        stamp, written = self.sidecar(case)
        if old and case + old.ext == name and old.info.get("sidecar", 0) == stamp:
            return old
        entry = new_entry(case, name)
        entry.info.update(written, sidecar=stamp)
        # Slicer takes the names of a stored mask from here, in this order.
        entry.info.setdefault("params", {}).setdefault("label_names", self.settings.label_set.values)
        return entry

    def sidecar(self, case: str) -> tuple[int, dict[str, Any]]:
        """What a round wrote about its mask, and the file's modification time (0 without one)."""
        path = self.paths.home / "original" / f"{case}.json"
        try:
            return path.stat().st_mtime_ns, dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return 0, {}


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _parse(path: Path) -> LocalDatastoreModel | None:
    try:
        return LocalDatastoreModel.model_validate_json(path.read_text())
    except (OSError, ValueError):
        return None


def listed(folder: Path) -> dict[str, str]:
    """Case id to file name; hidden files and other kinds are passed over, one file for an id."""
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if extension(Path(entry.name)) and entry.is_file():
                found.setdefault(case_id(Path(entry.name)), entry.name)
    return found


def new_entry(case: str, name: str) -> DataModel:
    return DataModel(info={"ts": int(time.time()), "name": name}, ext=name[len(case) :])
