"""A PACS over DICOMweb: MONAI Label's datastore with names checked, labels decoded, and no machine mask sent."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from dicomweb_client import DICOMwebClient
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings as platform
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from monailabel.datastore.local import ImageLabelModel, LocalDatastore
from requests import RequestException

from aslseg.cases.studies import FINAL, PSEUDO
from aslseg.files import sha256
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.http_errors import RefusedError, kept_name, safe_name
from aslseg.serving.kept_files import KeptFiles
from aslseg.serving.labels import decode_label
from aslseg.serving.saved_labels import SavedLabels
from aslseg.serving.series_cache import SeriesCache
from aslseg.serving.shared_json import SharedJsonFile, new_entry
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_header, write_label

logger = logging.getLogger(__name__)

UID = re.compile(r"\d+(\.\d+)*")
CONVERTER = "itkimage2segimage"
SILENT_SECONDS = 15  # clients poll every 5 seconds; a PACS that is down is not asked each time


def find_converter() -> None:
    """Put dcmqi's converter on PATH, so that MONAI Label need not download it.

    The package keeps it beside its Python code; a server started without its environment activated has no
    ``.venv/bin`` on PATH.
    """
    if shutil.which(CONVERTER):
        return
    spec = find_spec("dcmqi")
    folders = [Path(p) / "bin" for p in (spec.submodule_search_locations or [])] if spec else []
    found = next((f for f in folders if (f / CONVERTER).exists()), None)
    if found is None:
        raise RefusedError(f"{CONVERTER} is missing; install it with `pip install dcmqi`, then start again", 503)
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{found}"


def connect(url: str, settings: Settings, paths: Paths) -> DicomWebDatastore:
    """The datastore of a DICOMweb address. Nothing is asked of the PACS yet.

    Args:
        url: DICOMweb root, e.g. ``http://127.0.0.1:8042/dicom-web``.
        settings: ``modality`` decides which series are listed, unless MONAI Label's own filter was set.
        paths: Fetched series are kept under ``home``, which lies in ``model_dir`` where that is set.
    """
    find_converter()
    name, password = platform.MONAI_LABEL_DICOMWEB_USERNAME, platform.MONAI_LABEL_DICOMWEB_PASSWORD
    client = DICOMwebClientX(
        url=url,
        session=create_session_from_user_pass(name, password) if name and password else None,
        qido_url_prefix=platform.MONAI_LABEL_QIDO_PREFIX,
        wado_url_prefix=platform.MONAI_LABEL_WADO_PREFIX,
        stow_url_prefix=platform.MONAI_LABEL_STOW_PREFIX,
    )
    # the default is to try for minutes, on MONAI Label's event loop
    client.set_http_retry_params(retry=False)
    listed = dict(platform.MONAI_LABEL_DICOMWEB_SEARCH_FILTER)
    if listed == {"Modality": "CT"}:
        listed = {"Modality": settings.modality.upper()}
    cache = platform.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or str(paths.home / "dicom")
    return DicomWebDatastore(settings, paths, client, listed, cache)


class DicomWebDatastore(SharedJsonFile, DICOMWebDatastore):
    """The PACS as a datastore.

    Args:
        settings: Labels and limits.
        paths: Where sidecars lie.
        client: Connection to the PACS.
        listed: QIDO filter of the series that are offered.
        cache: Folder for fetched series.
    """

    def __init__(
        self, settings: Settings, paths: Paths, client: DICOMwebClient, listed: dict[str, Any], cache: str
    ) -> None:
        self._prepare_guard(settings, paths)
        self.kept, self.saved = KeptFiles(paths.home), SavedLabels(Ledger(paths.ledger))
        self._ask_again = 0.0
        by_frame = platform.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME
        super().__init__(client, listed, cache, by_frame, convert_to_nifti=True)
        self._series = SeriesCache(Path(self._datastore_path), client, by_frame, settings.max_voxels)

    def status(self) -> dict[str, Any]:
        """Counts; zeros while the PACS does not answer, so that the server stays up."""
        if time.monotonic() >= self._ask_again:
            try:
                return super().status()
            except RequestException as error:
                logger.warning("the PACS does not answer: %s", error)
                self._ask_again = time.monotonic() + SILENT_SECONDS
        return {"total": 0, "completed": 0, "label_tags": {}}

    def get_image_uri(self, image_id: str) -> str:
        """The NIfTI file of a series, with all the images that the PACS has.

        Raises:
            RefusedError: The PACS does not give the series.
            BadImageError: Its slices are not one even stack.
        """
        uid = _uid(image_id)
        with self._answering():
            path = self._series.volume(uid)
            known = self._datastore.objects.get(uid)
            if known is None or "SeriesInstanceUID" not in known.image.info:
                self._enter(uid, path)
        return str(path)

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """The file of a label; a DICOM SEG is fetched first."""
        tag = safe_name(label_tag, "label tag")
        with self._answering():
            if tag == FINAL:
                self._fetch_label(_uid(label_id))
            return super().get_label_uri(_uid(label_id), tag, image_id)

    def save_label(
        self,
        image_id: str,
        label_filename: str,
        label_tag: str,
        label_info: dict[str, Any],
        label_id: str = "",
    ) -> str:
        """Save a label; ``final`` goes to the PACS as DICOM SEG, machine masks stay here.

        Raises:
            RefusedError: Unsafe names, or the tag that only rounds write.
            BadLabelError: The label does not fit its series.
        """
        uid, tag = kept_name(image_id), kept_name(label_tag)
        source, info = Path(label_filename), dict(label_info or {})
        with self.saved.refusals(uid, tag, source, info), self.kept.parked(uid, source, info):
            tag = safe_name(label_tag, "label tag")
            _uid(image_id)
            return self._save_label(image_id, source, tag, info, label_id)

    def _save_label(self, image_id: str, source: Path, tag: str, info: dict[str, Any], label_id: str) -> str:
        if tag.casefold() == PSEUDO or (tag.casefold() == FINAL and tag != FINAL):
            raise RefusedError(f"tag {tag!r} cannot be saved; save under {FINAL!r}", 403)
        labels = self.settings.label_set
        image = read_header(Path(self.get_image_uri(image_id)), self.settings.max_voxels)
        class_map = decode_label(source, image, info.get("label_info"), labels, self.settings.max_upload_voxels)
        if tag != FINAL:
            return self._save_here(image_id, class_map, image.affine, tag, info)
        present = [n for n, value in labels.values.items() if value in np.unique(class_map)]
        # MONAI Label names the values that occur by their position in this list
        info["label_info"] = [{"name": name, "idx": labels.values[name]} for name in present]
        if not present:
            raise RefusedError("the label is empty; DICOM SEG cannot hold an empty label. Draw something first", 422)
        with tempfile.TemporaryDirectory(prefix="aslseg-") as folder, self._answering():
            path = Path(folder) / "label.nii.gz"
            write_label(path, class_map, image.affine)
            self.saved.record_saved(_uid(image_id), tag, info | {"sha256": sha256(path)})
            saved = DICOMWebDatastore.save_label(self, image_id, str(path), tag, info, label_id)
        # both are cached for two hours; the case must not be handed out again
        DICOMWebDatastore.get_labeled_images.cache.clear()
        DICOMWebDatastore.list_images.cache.clear()
        return saved

    def _save_here(self, case: str, class_map: np.ndarray, affine: np.ndarray, tag: str, info: dict[str, Any]) -> str:
        """A machine mask stays beside the fetched series."""
        with tempfile.TemporaryDirectory(prefix="aslseg-") as folder:
            path = Path(folder) / "label.nii.gz"
            write_label(path, class_map, affine)
            self.saved.record_saved(_uid(case), tag, info | {"sha256": sha256(path)})
            return LocalDatastore.save_label(self, case, str(path), tag, info)

    def remove_image(self, image_id: str, by: str | None = None) -> None:
        raise RefusedError("scans of the PACS are removed in the PACS, not here", 403)

    def remove_label(self, label_id: str, label_tag: str, by: str | None = None) -> None:
        raise RefusedError("labels of the PACS are removed in the PACS, not here", 403)

    def write_dataset(self, file: IO[bytes], limit: int | None = None) -> None:
        """The scans of a PACS are not archived here."""
        raise RefusedError("the scans are in the PACS; export them and the labels there", 404)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Keep a series that was fetched from the PACS."""
        return super().add_image(_uid(image_id), image_filename, image_info)

    def _enter(self, uid: str, path: Path) -> None:
        """List a fetched series with what the PACS says about it; its labels stay."""
        info = self._dicom_info(uid)
        with self._exclusive():
            self._init_from_datastore_file()
            entry = self._datastore.objects.get(uid) or ImageLabelModel(image=new_entry(uid, path.name), labels={})
            entry.image.info.update(info)
            self._datastore.objects[uid] = entry
            self._update_datastore_file(lock=False)

    def _fetch_label(self, uid: str) -> None:
        folder = Path(self._datastore.label_path(FINAL)) / uid
        with self._series.lock(uid):
            if not (folder.is_dir() and any(folder.iterdir())):
                study = str(self._series.study(uid)["0020000D"]["Value"][0])
                self._series.fetch(uid, study, folder)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (RequestException, IndexError) as error:
            text = f"the PACS does not give this series ({type(error).__name__}); is it online?"
            raise RefusedError(text, 502) from error


def _uid(name: str) -> str:
    if len(name) > 64 or not UID.fullmatch(name):
        raise RefusedError(f"{name[:80]!r} is not a DICOM UID", 404)
    return name
