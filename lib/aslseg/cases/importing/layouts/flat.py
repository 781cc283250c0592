"""Scans in one folder; labels, if any, as a studies folder has them, in ``labels/final``."""

from __future__ import annotations

from pathlib import Path

from aslseg.cases.importing.pairs import Found, image_files, pair_by_name
from aslseg.cases.studies import FINAL


class Flat:
    """A plain folder of scans."""

    title = "scans in one folder"

    def recognise(self, source: Path) -> bool:
        return bool(image_files(source))

    def pairs(self, source: Path) -> Found:
        return pair_by_name(image_files(source), image_files(source / "labels" / FINAL))
