"""MONAI Label's file datastore made safe: names checked, writes atomic, nothing lost between processes.

The store has no watcher thread. Every read compares the modification times of the few folders and of the JSON
file with those last seen and looks again only if they differ; that also works on network disks.

A label is saved in this order, so that a kill at any moment loses nothing: the upload is parked, checked and decoded;
the ledger records the hash and the info of the new file; the file is replaced; the change is appended to the log of
:mod:`aslseg.serving.change_log`. At the next start ``check_labels`` completes what was interrupted.
"""

from __future__ import annotations

import logging
import time
import zipfile
from pathlib import Path
from typing import IO, Any

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO
from aslseg.errors import BadImageError
from aslseg.files import FileStamp, atomic_file, sha256, sync_to_disk
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.change_log import IMAGE, Change
from aslseg.serving.empty_labels import EmptyLabels
from aslseg.serving.http_errors import RefusedError, kept_name, safe_name
from aslseg.serving.kept_files import KeptFiles, answerable, copy_file, remove_stale_temporaries
from aslseg.serving.labels import decode_label
from aslseg.serving.links import require_trusted
from aslseg.serving.listing import require_unused
from aslseg.serving.logged_json import LoggedJsonFile
from aslseg.serving.saved_labels import SavedLabels
from aslseg.serving.shared_json import BACKUPS, new_entry
from aslseg.settings import Paths, Settings
from aslseg.volume.io import (
    IMAGE_EXTENSIONS,
    case_id,
    extension,
    read_header,
    require_free_disk,
    write_label_into,
)
from aslseg.volume.untrusted import Limits, check_untrusted

logger = logging.getLogger(__name__)

PATTERNS = tuple(f"*{e}" for e in IMAGE_EXTENSIONS)
OWN_TAGS = (FINAL, ORIGINAL, PSEUDO)


class StudiesDatastore(LoggedJsonFile, LocalDatastore):
    """A studies folder that survives careless clients, killed processes and several writers.

    Args:
        studies: The folder.
        settings: Labels and limits.
        paths: Where versions, parked uploads, deleted files and sidecars lie.

    Attributes:
        corrected: Lines of :meth:`check_labels` from when it was opened.

    Raises:
        RefusedError: The folder cannot be written, or another process keeps it locked.
    """

    def __init__(self, studies: str, settings: Settings, paths: Paths) -> None:
        self._prepare_guard(settings, paths)
        self.root = Path(studies).resolve()
        self.saved, self.kept = SavedLabels(Ledger(paths.ledger)), KeptFiles(paths.home)
        self._empty = EmptyLabels(settings.label_set)
        config = self.root / "datastore_v2.json"
        had_json = any(config.with_name(f"{config.name}{ending}").exists() for ending in ("", *BACKUPS))
        try:
            for tag in OWN_TAGS:
                (self.root / "labels" / tag).mkdir(parents=True, exist_ok=True)
            paths.home.mkdir(parents=True, exist_ok=True)
            remove_stale_temporaries(self.root, *(self.root / "labels").iterdir(), paths.home, *self.kept.folders())
            self._open_log(self.root)
            self.saved.all()
            super().__init__(str(self.root), extensions=PATTERNS, auto_reload=False)
            if not had_json and self.saved.all():
                self.recovered = f"{config.name} was missing; it was rebuilt from the label files and the ledger"
                logger.error("%s", self.recovered)
            self.corrected = self.check_labels()
            self.saved.forget()
        except PermissionError as error:
            raise RefusedError(
                f"{studies} cannot be written ({error.filename}); labels are saved there. Give the server write access "
                "or point --studies at a copy",
                403,
            ) from None

    def _fresh(self) -> None:
        """Look at the disk again if something changed; while another writer is at work, what is known is used."""
        self.require_folder()
        if not self._stale():
            return
        try:
            with self._exclusive(0.0):
                self._reconcile_datastore()
        except RefusedError as error:
            logger.debug("the datastore was not read again: %s", error)

    def has_case(self, name: str) -> bool:
        """Whether there is a scan with this id, as far as is known without looking at the disk."""
        return name in self._datastore.objects

    def refresh(self) -> None:
        """Forget what was listed and read, and look again."""
        with self._exclusive():
            self._listing = self._loaded_stamp = None
            self._all_placed = False
            self._reconcile_datastore()

    def status(self) -> dict[str, Any]:
        self._fresh()
        members = self.members()
        completed = len(members.labelled)
        return {
            "total": completed + len(members.unlabelled),
            "completed": completed,
            "label_tags": dict(members.tags),
        }

    def json(self) -> dict[str, Any]:
        self._fresh()
        return super().json()

    def json_text(self, model: LocalDatastoreModel | None = None) -> str:
        if model is None:
            self._fresh()
        return super().json_text(model)

    def list_images(self) -> list[str]:
        self._fresh()
        return super().list_images()

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        self._fresh()
        return super().datalist(full_path)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        self._fresh()
        return self.members().labelled

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        self._fresh()
        return self.members().unlabelled

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

    def write_dataset(self, file: IO[bytes], limit: int | None = None) -> None:
        """Write a ZIP archive of all scans with their human labels, as MONAI Label arranges it.

        Args:
            file: Where the archive goes.
            limit: Only so many cases.

        Raises:
            RefusedError: There is no human label.
        """
        pairs = self.datalist()[: limit if limit and limit > 0 else None]
        if not pairs:
            raise RefusedError("no scan has a human label yet, so the dataset is empty", 404)
        with zipfile.ZipFile(file, "w") as archive:
            for pair in pairs:
                for kind, path in pair.items():
                    archive.write(path, arcname=f"{kind}/{Path(path).name}")
            archive.writestr("metadata.json", self._datastore.model_dump_json(exclude={"base_path"}))

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an uploaded scan; the same scan again is no error.

        Raises:
            RefusedError: Unsafe id, or another scan already has it.
            BadImageError: Not a readable 3-D volume.
        """
        source = Path(image_filename)
        case = safe_name(image_id or case_id(source), "image id")
        self.require_folder()
        with self.saved.refusals(case, "image", source, image_info or {}), answerable():
            self._add_image(case, source, image_info or {})
        return case

    def _add_image(self, case: str, source: Path, info: dict[str, Any]) -> None:
        if extension(source) is None:
            raise BadImageError(f"{source.name}: expected one of {', '.join(IMAGE_EXTENSIONS)}")
        check_untrusted(source, Limits(self.settings.max_upload_voxels))
        require_free_disk(self.root, self.settings.min_free_gb)
        name = f"{case}{extension(source)}"
        with self._changed() as changes:
            if case in self._datastore.objects:
                existing = self.root / f"{case}{self._datastore.objects[case].image.ext}"
                if sha256(existing) == sha256(source):
                    return
                raise RefusedError(f"another scan is called {case!r}; upload this one under another id", 409)
            require_unused(self.root, case)
            copy_file(source, require_trusted(self.root / name, self.root))
            entry = new_entry(case, name)
            entry.info.update(info, ts=int(time.time()), name=name)
            changes.append(Change(case, IMAGE, entry))

    def remove_image(self, image_id: str, by: str | None = None) -> None:
        """Move a scan and its labels to the trash.

        Args:
            image_id: The scan.
            by: Who asks, if that is known.

        Raises:
            RefusedError: No such scan, or a link of somebody else.
        """
        with self._changed() as changes:
            obj = self._known(image_id)
            for tag in list(obj.labels):
                self._discard_label(image_id, tag, by)
                changes.append(Change(image_id, tag, None))
            path = require_trusted(self.root / f"{image_id}{obj.image.ext}", self.root)
            self._discard(image_id, "image", path, obj.image.info, by)
            changes.append(Change(image_id, IMAGE, None))

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Save a label, checked against its scan and decoded by name; a human one that it replaces stays as a version.

        Raises:
            RefusedError: Unknown scan, unsafe tag, the tag that only rounds write, a locked datastore, or an empty
                human label that was not said to be meant (:mod:`aslseg.serving.empty_labels`).
            BadLabelError: The label does not fit its scan. As with every refusal but that of a disk that is away, the
                upload is kept in ``parked`` and the message says where.
        """
        case, tag = kept_name(image_id), kept_name(label_tag)
        source, info = Path(label_filename), dict(label_info or {})
        self.require_folder()  # nothing is kept in the place of a disk that is away
        with self.saved.refusals(case, tag, source, info), self.kept.parked(case, source, info):
            tag = self._checked_tag(safe_name(label_tag, "label tag"))
            self._save_label(safe_name(image_id, "image id"), source, tag, info)
        return case

    def _save_label(self, case: str, source: Path, tag: str, info: dict[str, Any]) -> None:
        self._fresh()
        obj = self._known(case)
        target = require_trusted(self.root / "labels" / tag, self.root) / f"{case}.nii.gz"
        require_free_disk(self.root, self.settings.min_free_gb)
        image = read_header(self.root / f"{case}{obj.image.ext}", self.settings.max_voxels)
        limit = self.settings.max_upload_voxels
        class_map = decode_label(source, image, info.get("label_info"), self.settings.label_set, limit)
        if tag == FINAL:
            self._empty.require_meant(case, class_map, info)
        info = self._canonical(info) | {"ts": int(time.time()), "name": target.name}
        with self._changed() as changes:
            self._known(case)
            self._keep_version(case, tag)
            with atomic_file(target) as temporary:
                write_label_into(temporary, class_map, image.affine)
                stamp = FileStamp.of(self._sidecar_path(case))
                info |= {"sha256": sha256(temporary), "sidecar": stamp.mtime_ns if stamp else 0}
                self.saved.record_saved(case, tag, info, obj.image.info)
            self._remove_other_files(case, tag)
            changes.append(Change(case, tag, DataModel(info=info, ext=".nii.gz")))

    def remove_label(self, label_id: str, label_tag: str, by: str | None = None) -> None:
        """Move a label to the trash.

        Args:
            label_id: Its scan.
            label_tag: Its tag.
            by: Who asks, if that is known.

        Raises:
            RefusedError: No such scan, or an unsafe tag.
        """
        tag = safe_name(label_tag, "label tag")
        with self._changed() as changes:
            self._known(label_id)
            self._discard_label(label_id, tag, by)
            changes.append(Change(label_id, tag, None))

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        with self._changed() as changes:
            changes.append(self._informed(image_id, info))

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        with self._changed() as changes:
            label = self._known(label_id).labels.get(label_tag)
            if label is None:
                raise RefusedError(f"{label_id!r} has no label with the tag {str(label_tag)[:80]!r}", 404)
            changes.append(Change(label_id, label_tag, DataModel(ext=label.ext, info={**label.info, **info})))

    def update_infos(self, infos: dict[str, dict[str, Any]]) -> None:
        """Info of many scans in one transaction; unknown ids are passed over."""
        with self._changed() as changes:
            changes += [self._informed(c, info) for c, info in infos.items() if c in self._datastore.objects]

    def _informed(self, case: str, info: dict[str, Any]) -> Change:
        """The entry of a scan with more info."""
        old = self._known(case).image
        return Change(case, IMAGE, DataModel(ext=old.ext, info={**old.info, **info}))

    def _known(self, image_id: str) -> ImageLabelModel:
        obj = self._datastore.objects.get(image_id)
        if obj is None:
            raise RefusedError(f"no scan {str(image_id)[:80]!r} in {self.root.name}", 404)
        return obj

    def _checked_tag(self, tag: str) -> str:
        """The tag, unless only rounds may write it, or it differs from another one in nothing but upper and lower case.

        Raises:
            RefusedError: 403 or 409.
        """
        if tag.casefold() == PSEUDO:
            raise RefusedError(f"tag {PSEUDO!r} is written by rounds only; save under {FINAL!r}", 403)
        known = {*OWN_TAGS, *(f.name for f in (self.root / "labels").iterdir())}
        alike = next((k for k in sorted(known) if k.casefold() == tag.casefold() and k != tag), None)
        if alike is not None and tag not in known:
            raise RefusedError(f"tag {tag!r} could be mistaken for {alike!r}; save under {alike!r}", 409)
        return tag

    def _canonical(self, info: dict[str, Any]) -> dict[str, Any]:
        """Label info that describes the decoded file; what the client sent is kept beside it."""
        ours = [{"name": name, "idx": value} for name, value in self.settings.label_set.values.items()]
        return {**info, "client_label_info": info.get("label_info"), "label_info": ours}

    def _keep_version(self, case: str, tag: str) -> None:
        """Keep the human label that is about to be replaced, and all label files that are about to be removed."""
        label = self._datastore.objects[case].labels.get(tag)
        for path in self._files_of(case, tag, self.root / "labels" / tag):
            if (tag == FINAL or path.name != f"{case}.nii.gz") and path.exists():
                described = label is not None and path.name == f"{case}{label.ext}"
                self.kept.keep_version(case, path, label.info if label and described else {"name": path.name})

    def _discard_label(self, case: str, tag: str, by: str | None) -> None:
        """Move all files of a label to the trash."""
        label = self._datastore.objects[case].labels.get(tag)
        folder = require_trusted(self.root / "labels" / tag, self.root)
        for path in self._files_of(case, tag, folder):
            self._discard(case, tag, path, label.info if label else {}, by)

    def _discard(self, case: str, tag: str, path: Path, info: dict[str, Any], by: str | None) -> None:
        target = self.kept.trash_path(case, tag, path)
        about = {"sha256": sha256(path), "by": by, "file": path.name, "trash": str(target.relative_to(self.kept.home))}
        self.saved.record_deleted(case, tag, about)
        self.kept.discard(path, target, about | {"case": case, "tag": tag, "time": time.time(), "info": info})

    def _remove_other_files(self, case: str, tag: str) -> None:
        """Remove labels of the case with another extension, which the next start would find beside the new one."""
        folder = self.root / "labels" / tag
        others = [path for path in self._files_of(case, tag, folder) if path.name != f"{case}.nii.gz"]
        for path in others:
            path.unlink(missing_ok=True)
        if others:
            sync_to_disk(folder)

    def _files_of(self, case: str, tag: str, folder: Path) -> list[Path]:
        """The label files of a case, as listed when the lock was taken."""
        return [folder / name for name in self._listing.label_names(case, tag)] if self._listing else []

    def check_labels(self, thorough: bool = False) -> list[str]:
        """Make info and files agree where a kill, or somebody who copied a file, came between them.

        Args:
            thorough: Hash every file, not only those that seem to have been written after their info.

        Returns:
            A line for each info that was corrected.
        """
        said: list[str] = []
        with self._changed() as changes:
            for case, obj in self._datastore.objects.items():
                for tag, label in obj.labels.items():
                    path = self.root / "labels" / tag / f"{case}{label.ext}"
                    checked = self.saved.checked_entry(case, tag, path, label, thorough)
                    if checked is not label:
                        changes.append(Change(case, tag, checked))
                        said.append(f"labels/{tag}/{path.name}: its info was corrected")
            if said:
                logger.warning("%d labels are not what their info said; the info was corrected", len(said))
        return said

    def _new_label_entry(self, case: str, tag: str, name: str) -> DataModel:
        return self.saved.new_entry(case, tag, self.root / "labels" / tag / name)
