"""Scans in one folder and labels in another, under the same names: ``images/a.nii.gz``, ``labels/a.nii.gz``."""

from __future__ import annotations

import re
from pathlib import Path

from aslseg.cases.importing.pairs import LABEL_WORDS, SCAN_WORDS, Found, image_files, pair_by_name

SCANS = re.compile(rf"(?i)({SCAN_WORDS}|scans|volumes|cts|mrs|imagestr)")
LABELS = re.compile(rf"(?i)({LABEL_WORDS}|labelstr)")


class TwoFolders:
    """A folder of scans and a folder of labels beside it."""

    title = "two folders, scans and labels"

    def recognise(self, source: Path) -> bool:
        return len(_folders(source, SCANS)) == 1 and len(_folders(source, LABELS)) == 1

    def pairs(self, source: Path) -> Found:
        (scans,), (labels,) = _folders(source, SCANS), _folders(source, LABELS)
        return pair_by_name(image_files(scans), image_files(labels))


def _folders(source: Path, pattern: re.Pattern[str]) -> list[Path]:
    return [p for p in sorted(source.iterdir()) if p.is_dir() and pattern.fullmatch(p.name) and image_files(p)]
