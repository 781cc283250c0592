"""MONAI Label's file datastore made safe: names checked, writes atomic, nothing lost between processes.

The store has no watcher thread. Every read compares the modification times of the few folders and of the JSON
file with those last seen and looks again only if they differ; that also works on network disks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO
from aslseg.errors import AslsegError, BadImageError, BadLabelError
from aslseg.files import atomic_file, sha256, write_json
from aslseg.serving.http_errors import RefusedError, inside, safe_name
from aslseg.serving.labels import decode_label
from aslseg.serving.shared_json import SharedJsonFile, new_entry
from aslseg.settings import Paths, Settings
from aslseg.volume.io import (
    IMAGE_EXTENSIONS,
    case_id,
    extension,
    read_image,
    require_free_disk,
    write_label,
)
from aslseg.volume.untrusted import Limits, check_untrusted

logger = logging.getLogger(__name__)

PATTERNS = tuple(f"*{e}" for e in IMAGE_EXTENSIONS)
# Two changes within the clock tick of a file system leave the same modification time.
TICK_NS = 100_000_000


class StudiesDatastore(SharedJsonFile, LocalDatastore):
    """A studies folder that survives careless clients, killed processes and several writers.

    Args:
        studies: The folder.
        settings: Labels and limits.
        paths: Where versions, parked uploads and sidecars lie.

    Raises:
        RefusedError: The folder cannot be written.
    """

    def __init__(self, studies: str, settings: Settings, paths: Paths) -> None:
        self._prepare_guard(settings, paths)
        self._seen: tuple[int, ...] | None = None
        self.root = Path(studies).resolve()
        try:
            for tag in (FINAL, ORIGINAL, PSEUDO):
                (self.root / "labels" / tag).mkdir(parents=True, exist_ok=True)
            paths.home.mkdir(parents=True, exist_ok=True)
            super().__init__(str(self.root), extensions=PATTERNS, auto_reload=False)
        except PermissionError as error:
            raise RefusedError(
                f"{studies} cannot be written ({error.filename}); labels are saved there. Give the server write access "
                "or point --studies at a copy",
                403,
            ) from None

    def _fresh(self) -> None:
        stamp = self._stamp()
        if stamp != self._seen:
            self._reconcile_datastore()
            self._seen = stamp if time.time_ns() - max(stamp) > TICK_NS else None

    def _stamp(self) -> tuple[int, ...]:
        labels = self.root / "labels"
        watched = [self.root, labels, self.paths.home / "original", Path(self._datastore_config_path)]
        watched += sorted(f for f in labels.iterdir() if f.is_dir())
        return tuple(p.stat().st_mtime_ns if p.exists() else 0 for p in watched)

    def refresh(self) -> None:
        self._seen = None
        self._fresh()

    def status(self) -> dict[str, Any]:
        self._fresh()
        return super().status()

    def json(self) -> dict[str, Any]:
        self._fresh()
        return super().json()

    def list_images(self) -> list[str]:
        self._fresh()
        return super().list_images()

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        self._fresh()
        return super().datalist(full_path)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        self._fresh()
        return super().get_labeled_images(label_tag, labels)

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        self._fresh()
        return super().get_unlabeled_images(label_tag, labels)

    def get_image_uri(self, image_id: str) -> str:
        self._fresh()
        return super().get_image_uri(image_id)

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        self._fresh()
        return super().get_label_uri(label_id, label_tag)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        self._fresh()
        return super().get_image_info(image_id)

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        self._fresh()
        return super().get_label_info(label_id, label_tag)

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        self._fresh()
        return super().get_labels_by_image_id(image_id)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an uploaded scan; the same scan again is no error.

        Raises:
            RefusedError: Unsafe id, or another scan already has it.
            BadImageError: Not a readable 3-D volume.
        """
        source = Path(image_filename)
        case = safe_name(image_id or case_id(source), "image id")
        if extension(source) is None:
            raise BadImageError(f"{source.name}: expected one of {', '.join(IMAGE_EXTENSIONS)}")
        check_untrusted(source, Limits(self.settings.max_upload_voxels))
        require_free_disk(self.root, self.settings.min_free_gb)
        name = f"{case}{extension(source)}"
        with self._changed():
            if case in self._datastore.objects:
                existing = self.root / f"{case}{self._datastore.objects[case].image.ext}"
                if sha256(existing) == sha256(source):
                    return case
                raise RefusedError(f"another scan is called {case!r}; upload this one under another id", 409)
            self._copy(source, self.root / name)
            entry = new_entry(case, name)
            entry.info.update(image_info or {}, ts=int(time.time()), name=name)
            self._datastore.objects[case] = ImageLabelModel(image=entry)
        return case

    def remove_image(self, image_id: str) -> None:
        """Remove a scan. Its human label stays as a version."""
        with self._changed():
            obj = self._known(image_id)
            for tag in list(obj.labels):
                self._retire(image_id, tag)
            (self.root / f"{image_id}{obj.image.ext}").unlink(missing_ok=True)
            del self._datastore.objects[image_id]

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Save a label; a human one (``final``) is checked, decoded by name, and the one before kept as a version.

        Raises:
            RefusedError: Unknown scan, unsafe tag, or the tag that only rounds write.
            BadLabelError: The label does not fit; the upload is kept in ``parked`` and the message says where.
        """
        tag = safe_name(label_tag, "label tag")
        if tag == PSEUDO:
            raise RefusedError(f"tag {PSEUDO!r} is written by rounds only; save under {FINAL!r}", 403)
        self._fresh()
        obj = self._known(image_id)
        source, info = Path(label_filename), dict(label_info or {})
        folder = inside(self.root / "labels" / tag, self.root)
        require_free_disk(self.root, self.settings.min_free_gb)
        class_map = None
        if tag == FINAL:
            image = read_image(self.root / f"{image_id}{obj.image.ext}", self.settings.max_voxels)
            try:
                class_map = decode_label(source, image, info.get("label_info"), self.settings.label_set)
            except BadLabelError as error:
                raise self._park(image_id, source, info, error) from None
            info = self._canonical(info)
        ext = ".nii.gz" if class_map is not None else extension(source)
        if ext is None:
            raise BadLabelError(f"{source.name}: expected one of {', '.join(IMAGE_EXTENSIONS)}")
        with self._changed():
            obj = self._known(image_id)
            self._keep_version(image_id, tag)
            target = folder / f"{image_id}{ext}"
            if class_map is not None:
                write_label(target, class_map, image.affine)
            else:
                self._copy(source, target)
            self._unlink(image_id, folder, but=target)
            info.update(
                ts=int(time.time()),
                name=target.name,
                sha256=sha256(target),
                sidecar=self.sidecar(image_id)[0],
            )
            obj.labels[tag] = DataModel(info=info, ext=ext)
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label; a human one stays as a version."""
        tag = safe_name(label_tag, "label tag")
        with self._changed():
            self._known(label_id)
            self._retire(label_id, tag)
            self._datastore.objects[label_id].labels.pop(tag, None)

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        with self._changed():
            self._known(image_id).image.info.update(info)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        with self._changed():
            label = self._known(label_id).labels.get(label_tag)
            if label is None:
                raise RefusedError(f"{label_id!r} has no label with the tag {str(label_tag)[:80]!r}", 404)
            label.info.update(info)

    def update_infos(self, infos: dict[str, dict[str, Any]]) -> None:
        """Info of many scans in one write; unknown ids are passed over."""
        with self._changed():
            for case, info in infos.items():
                if case in self._datastore.objects:
                    self._datastore.objects[case].image.info.update(info)

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """Look at the disk again, change, write: one transaction."""
        with self._exclusive():
            self._reconcile_datastore()
            yield
            self._update_datastore_file(lock=False)

    def _known(self, image_id: str) -> ImageLabelModel:
        obj = self._datastore.objects.get(image_id)
        if obj is None:
            raise RefusedError(f"no scan {str(image_id)[:80]!r} in {self.root.name}", 404)
        return obj

    def _copy(self, source: Path, target: Path) -> None:
        inside(target.parent, self.root)
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)

    def _canonical(self, info: dict[str, Any]) -> dict[str, Any]:
        """Label info that describes the decoded file; what the client said is kept beside it."""
        ours = [{"name": name, "idx": value} for name, value in self.settings.label_set.values.items()]
        return {**info, "client_label_info": info.get("label_info"), "label_info": ours}

    def _retire(self, case: str, tag: str) -> None:
        """Take a label's file away; a human one stays as a version."""
        self._keep_version(case, tag)
        self._unlink(case, inside(self.root / "labels" / tag, self.root))

    def _keep_version(self, case: str, tag: str) -> None:
        label = self._datastore.objects[case].labels.get(tag)
        path = self.root / "labels" / tag / f"{case}{label.ext}" if label else None
        if tag != FINAL or label is None or path is None or not path.exists():
            return
        kept = self.paths.home / "versions" / case / f"{time.time_ns()}{label.ext}"
        with atomic_file(kept) as temporary:
            shutil.copyfile(path, temporary)
        write_json(kept.with_name(f"{case_id(kept)}.json"), json.loads(json.dumps(label.info, default=str)))

    @staticmethod
    def _unlink(case: str, folder: Path, but: Path | None = None) -> None:
        """Remove the files of a case; ``but`` stays. Another extension would be picked up at the next start."""
        for path in list(folder.iterdir()) if folder.is_dir() else []:
            if extension(path) and case_id(path) == case and path != but:
                path.unlink()

    def _park(self, case: str, source: Path, info: dict[str, Any], error: AslsegError) -> BadLabelError:
        """Keep an upload that cannot be used, so that no drawing is lost."""
        digest = hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:8]
        kept = self.paths.home / "parked" / f"{case}-{digest}{extension(source) or '.bin'}"
        with atomic_file(kept) as temporary:
            shutil.copyfile(source, temporary)
        write_json(kept.with_name(f"{kept.name}.json"), {"case": case, "reason": str(error), "params": info})
        message = str(error).replace(source.name, f"of {case}")
        return BadLabelError(f"{message}. Your upload is kept as {kept.relative_to(self.paths.home)}")
