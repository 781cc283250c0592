"""Series of a PACS kept on disk as NIfTI: complete ones only, and fetched again when the PACS has more images."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from dicomweb_client import DICOMwebClient
from filelock import FileLock
from monailabel.datastore.utils.dicom import dicom_web_download_series
from requests import RequestException

from aslseg.errors import BadImageError, DiskFullError
from aslseg.files import write_json
from aslseg.serving.http_errors import RefusedError
from aslseg.volume.dicom_series import find_series, read_stack, stack, write_volume

logger = logging.getLogger(__name__)

NUMBER_OF_INSTANCES = "00201209"  # Number of Series Related Instances, which QIDO-RS may return
ASK_SECONDS = 30.0  # every click opens its series; the PACS is not asked each time


class SeriesCache:
    """Fetched series: ``<uid>/`` holds the slices of its volume, ``<uid>.nii.gz`` the volume.

    The record ``.series/<uid>.json`` is written when a series has been fetched completely, and says how many images
    it had; its notes are added when the volume has been written. A series without a record is fetched again.

    Args:
        root: Folder of the cache.
        client: Connection to the PACS.
        by_frame: Fetch pixels frame by frame, for a PACS that cannot send a whole series.
        max_voxels: Larger series are refused.
    """

    def __init__(self, root: Path, client: DICOMwebClient, by_frame: bool, max_voxels: float) -> None:
        self.root, self._client, self._by_frame, self._max_voxels = root, client, by_frame, max_voxels
        self._asked: dict[str, float] = {}

    def volume(self, uid: str) -> Path:
        """The NIfTI file of a series, fetched unless all images that the PACS has are here.

        Raises:
            RefusedError: The PACS does not know the series, or sent a part of it.
            BadImageError: Its slices are not one even stack.
            DiskFullError: It cannot be kept; nothing was changed.
            RequestException: The PACS does not answer, and the series is not here.
        """
        path = self.root / f"{uid}.nii.gz"
        with self.lock(uid):
            recent = time.monotonic() - self._asked.get(uid, -ASK_SECONDS) < ASK_SECONDS
            if not (recent and path.exists()):
                self._update(uid, path)
            if not (path.exists() and "notes" in self._read_record(uid)):
                self._convert(uid, path)
        return path

    def fetch(self, uid: str, study: str, folder: Path, expected: int = 1) -> int:
        """Fetch a series into a folder that appears complete or not at all, and replaces an older one.

        Args:
            uid: SeriesInstanceUID.
            study: StudyInstanceUID.
            folder: Where its files are put.
            expected: How many images the PACS has.

        Returns:
            How many images came.

        Raises:
            RefusedError: Fewer came than expected.
            DiskFullError: They cannot be kept.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.root) as temporary:
            new = Path(temporary) / "series"
            try:
                dicom_web_download_series(study, uid, str(new), self._client, self._by_frame)
            except RequestException:
                raise
            except OSError as error:
                raise DiskFullError(
                    f"the series cannot be kept in {self.root} ({error.strerror}); free some space and open it again"
                ) from error
            came = len(list(new.iterdir()))
            if came < expected:
                raise RefusedError(
                    f"the PACS sent {came} of the {expected} images of this series; nothing was kept. Open it again",
                    502,
                )
            self._record(uid).unlink(missing_ok=True)
            if folder.exists():
                os.replace(folder, Path(temporary) / "old")
            os.replace(new, folder)
        return came

    def notes(self, uid: str) -> list[str]:
        """What was left out of a series, for the people who use its volume."""
        return list(self._read_record(uid).get("notes", []))

    def study(self, uid: str) -> dict[str, Any]:
        """What the PACS says about a series, in DICOM JSON.

        Raises:
            RefusedError: It does not know the series.
        """
        found = self._client.search_for_series(search_filters={"SeriesInstanceUID": uid}, fields=[NUMBER_OF_INSTANCES])
        # a PACS may ignore the filter
        match = next((f for f in found if f.get("0020000E", {}).get("Value") == [uid]), None)
        if match is None:
            raise RefusedError(f"the PACS has no series {uid}; is it still there?", 404)
        return dict(match)

    def lock(self, uid: str) -> FileLock:
        """Held while a series is fetched, over threads and processes."""
        folder = self.root / ".series"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{uid}.lock")

    def _update(self, uid: str, path: Path) -> None:
        """Make the cached images those of the PACS."""
        have = self._read_record(uid).get("instances", 0)
        try:
            entry = self.study(uid)
            study = str(entry["0020000D"]["Value"][0])
            expected = self._count(entry, study, uid)
            if have != expected:
                came = self.fetch(uid, study, self.root / uid, expected)
                write_json(self._record(uid), {"instances": came})
        except RequestException:
            if not (have and path.exists()):
                raise
            logger.warning("series %s: the PACS does not answer; the %d images fetched before are used", uid, have)
        self._asked[uid] = time.monotonic()

    def _count(self, entry: dict[str, Any], study: str, uid: str) -> int:
        number = entry.get(NUMBER_OF_INSTANCES, {}).get("Value")
        return int(number[0]) if number else len(self._client.retrieve_series_metadata(study, uid))

    def _convert(self, uid: str, path: Path) -> None:
        """Write the volume of the images that were fetched."""
        folder = self.root / uid
        series = next((s for s in find_series(folder) if s.uid == uid), None)
        try:
            if series is None:
                raise BadImageError("it holds no DICOM images")
            ordered = stack(series)
            volume = read_stack(ordered, self._max_voxels)
        except BadImageError as error:
            # only now: a file that vanishes for a moment loses what is listed about its labels
            path.unlink(missing_ok=True)
            raise BadImageError(f"series {uid}: {error}") from None
        for note in ordered.notes:
            logger.warning("series %s: %s", uid, note)
        # a DICOM SEG refers to the images in this folder, which must be those of the volume
        used = {s.path for s in ordered.slices}
        for file in set(folder.rglob("*.dcm")) - used:
            file.unlink()
        write_volume(path, volume)
        write_json(self._record(uid), self._read_record(uid) | {"notes": list(ordered.notes)})

    def _record(self, uid: str) -> Path:
        return self.root / ".series" / f"{uid}.json"

    def _read_record(self, uid: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._record(uid).read_text()))
        except (OSError, ValueError, TypeError):
            return {}
