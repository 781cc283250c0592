"""Labels beside their scans: ``a.nii.gz`` and ``a_seg.nii.gz``, ``a_label``, ``a-mask``, ``a_segmentation``."""

from __future__ import annotations

from pathlib import Path

from aslseg.cases.importing.pairs import Found, image_files, is_label_name, pair_by_name


class Beside:
    """Scans and labels in one folder."""

    title = "labels beside their scans"

    def recognise(self, source: Path) -> bool:
        return any(is_label_name(path) for path in image_files(source))

    def pairs(self, source: Path) -> Found:
        files = image_files(source)
        labels = [p for p in files if is_label_name(p)]
        return pair_by_name([p for p in files if p not in labels], labels)
