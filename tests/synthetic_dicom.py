"""DICOM series of generated slices, and a PACS in memory that gives them over DICOMweb's client interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SHAPE = (20, 16)  # columns, rows


def make_series(
    slices: int = 12,
    step: Sequence[float] = (0.0, 0.0, 3.0),
    orientation: Sequence[float] = AXIAL,
    like: Dataset | None = None,
    **tags: Any,
) -> list[FileDataset]:
    """A series whose slice k holds the values 100 k + column, before its intercept of -1024.

    Args:
        slices: How many.
        step: From a slice to the next, LPS mm.
        orientation: Directions of rows and columns.
        like: Another slice whose study and series this one belongs to.
        **tags: Values of further tags, the same in all slices.
    """
    study, series, frame = (generate_uid() for _ in range(3))
    if like is not None:
        study, series, frame = like.StudyInstanceUID, like.SeriesInstanceUID, like.FrameOfReferenceUID
    made = []
    for k in range(slices):
        one = _slice(study, series, frame, k)
        one.ImagePositionPatient = [-24 + k * step[0], -24 + k * step[1], k * step[2]]
        one.ImageOrientationPatient = list(orientation)
        for tag, value in tags.items():
            setattr(one, tag, value)
        made.append(one)
    return made


def _slice(study: str, series: str, frame: str, k: int) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CT
    meta.MediaStorageSOPInstanceUID = generate_uid()
    one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    one.is_little_endian, one.is_implicit_VR = True, False
    one.SOPClassUID, one.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
    one.PatientName, one.PatientID, one.PatientBirthDate, one.PatientSex = "Test^Phantom", "T1", "", ""
    one.StudyDate, one.StudyTime, one.AccessionNumber, one.StudyID = "20200101", "000000", "", "1"
    one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
    one.Modality, one.SeriesNumber, one.InstanceNumber, one.Manufacturer = "CT", 1, k + 1, "none"
    one.ImageType, one.SeriesDescription = ["ORIGINAL", "PRIMARY", "AXIAL"], "phantom"
    one.PixelSpacing, one.SliceThickness = [1.5, 1.25], 3.0  # between rows, between columns
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.Columns, one.Rows = SHAPE
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    one.RescaleIntercept, one.RescaleSlope = -1024, 1
    pixels = 100 * k + np.tile(np.arange(SHAPE[0]), (SHAPE[1], 1))
    one.PixelData = pixels.astype("<i2").tobytes()
    return one


def write_series(folder: Path, slices: Sequence[FileDataset], prefix: str = "im") -> Path:
    """One file a slice; the names are in another order than the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, one in enumerate(slices):
        one.save_as(folder / f"{prefix}{len(slices) - n:03d}.dcm", write_like_original=False)
    return folder


class Pacs:
    """What the datastore asks of a DICOMweb client.

    Args:
        *series: The slices of each series.
        counts: Whether QIDO answers with the number of instances, which is optional in older servers.
    """

    base_url = "http://pacs.invalid/dicom-web"

    def __init__(self, *series: Sequence[FileDataset], counts: bool = True) -> None:
        self.series = {str(s[0].SeriesInstanceUID): list(s) for s in series}
        self.counts = counts
        self.fetched = 0
        self.answers: list[FileDataset] | None = None

    def search_for_series(
        self, search_filters: dict[str, Any] | None = None, **_: Any
    ) -> list[dict[str, dict[str, Any]]]:
        wanted = (search_filters or {}).get("SeriesInstanceUID")
        modality = (search_filters or {}).get("Modality")
        found = []
        for uid, slices in self.series.items():
            if wanted not in (None, uid) or modality not in (None, slices[0].Modality):
                continue
            entry = Dataset()
            for tag in ("StudyDate", "StudyTime", "Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID"):
                setattr(entry, tag, getattr(slices[0], tag))
            if self.counts:
                entry.NumberOfSeriesRelatedInstances = len(slices)
            found.append(entry.to_json_dict())
        return found

    def retrieve_series(self, study: str, series: str, **_: Any) -> list[FileDataset]:
        self.fetched += 1
        return self.series[series] if self.answers is None else self.answers

    def retrieve_series_metadata(self, study: str, series: str, **_: Any) -> list[dict[str, dict[str, Any]]]:
        found = []
        for one in self.series[series]:
            entry = Dataset()
            for element in one:
                if element.keyword != "PixelData":
                    entry.add(element)
            found.append(entry.to_json_dict())
        return found
