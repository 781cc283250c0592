"""A folder for each case: ``case/ct.nii.gz``, with ``case/label.nii.gz`` or ``case/segmentations/liver.nii.gz``."""

from __future__ import annotations

from pathlib import Path

from aslseg.cases.importing.pairs import Found, LabelFile, Pair, image_files, is_label_name
from aslseg.volume.io import case_id

SEGMENTATIONS = "segmentations"  # as TotalSegmentator's data set has it: a file for each label, named after it


class CaseFolders:
    """One folder for each case; several scans in it are a question to the user."""

    title = "a folder for each case"

    def recognise(self, source: Path) -> bool:
        folders = _folders(source)
        return not image_files(source) and bool(folders) and all(_scans(f) for f in folders)

    def pairs(self, source: Path) -> Found:
        pairs = []
        for folder in _folders(source):
            labels = [LabelFile(p) for p in image_files(folder) if is_label_name(p)]
            labels += [LabelFile(p, case_id(p)) for p in image_files(folder / SEGMENTATIONS)]
            pairs += [Pair(folder.name, scan, tuple(labels)) for scan in _scans(folder)]
        return Found(pairs)


def _folders(source: Path) -> list[Path]:
    return [p for p in sorted(source.iterdir()) if p.is_dir() and image_files(p)]


def _scans(folder: Path) -> list[Path]:
    return [p for p in image_files(folder) if not is_label_name(p)]
