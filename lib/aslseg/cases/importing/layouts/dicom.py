"""Folders of DICOM files; a scan is what shares a SeriesInstanceUID, wherever its files lie."""

from __future__ import annotations

from pathlib import Path

from aslseg.cases.importing.pairs import LABEL_NAME, Found, LabelFile, Pair, image_files, labelled_stem
from aslseg.volume.dicom_series import BARE_EXTENSIONS, Series, find_series
from aslseg.volume.io import case_id, extension

MAGIC_AT, MAGIC = 128, b"DICM"
MIN_SLICES = 3


class Dicom:
    """DICOM series, with labels as image files in a folder that holds one series."""

    title = "DICOM series"

    def recognise(self, source: Path) -> bool:
        return any(_is_dicom(p) for p in source.rglob("*") if p.is_file() and extension(p) is None)

    def pairs(self, source: Path) -> Found:
        pairs: list[Pair] = []
        passed_over: list[str] = []
        for series in find_series(source, passed_over):
            reason = _no_scan(series)
            if reason:
                passed_over.append(f"series {series.description or 'without description'}: {reason}")
            else:
                pairs.append(Pair("", series, patient=series.patient or series.study))
        labels: dict[int, list[LabelFile]] = {}
        for path in image_files(source, "**/*"):
            owner = _owner(path, pairs, source)
            if owner is None:
                passed_over.append(f"{path.name}: not in a folder with exactly one series, so it belongs to none")
            else:
                labels.setdefault(owner, []).append(LabelFile(path, _label_name(path)))
        pairs = [Pair("", p.scan, tuple(labels.get(n, ())), p.patient) for n, p in enumerate(pairs)]
        return Found(pairs, passed_over=passed_over)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() in BARE_EXTENSIONS:
        return True
    try:
        with path.open("rb") as file:
            return file.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC
    except OSError:
        return False


def _no_scan(series: Series) -> str:
    """Why a series is no scan to segment; empty if it is one."""
    if series.localizer:
        return "a localizer"
    if not series.slices:
        return (
            f"{series.modality or 'its'} objects without images in space; segmentations are imported from NIfTI files"
        )
    if len(series.slices) + series.unplaced < MIN_SLICES:
        return f"{len(series.slices)} images; a volume has at least {MIN_SLICES}"
    return ""


def _owner(path: Path, pairs: list[Pair], source: Path) -> int | None:
    """The series that a label belongs to: the only one below the nearest folder that has any."""
    folder = path.parent
    while True:
        below = [n for n, pair in enumerate(pairs) if any(f.is_relative_to(folder) for f in pair.files)]
        if below or folder == source:
            return below[0] if len(below) == 1 else None
        folder = folder.parent


def _label_name(path: Path) -> str:
    """``liver.nii.gz`` and ``liver_mask.nii.gz`` are the liver; ``label.nii.gz`` says it by its values."""
    stem = labelled_stem(path) or case_id(path)
    return "" if LABEL_NAME.fullmatch(stem) else stem
