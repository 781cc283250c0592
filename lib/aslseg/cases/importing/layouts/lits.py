"""LiTS: ``volume-N.nii`` and ``segmentation-N.nii``, in one folder or in several."""

from __future__ import annotations

import re
from pathlib import Path

from aslseg.cases.importing.pairs import Found, LabelFile, Pair, image_files
from aslseg.volume.io import case_id

NUMBERED = re.compile(r"(?i)(test-)?(volume|segmentation)-(\d+)")


class LiTS:
    """The layout of the Liver Tumour Segmentation challenge, and of others that number their volumes like it."""

    title = "LiTS (volume-N, segmentation-N)"

    def recognise(self, source: Path) -> bool:
        return any("volume" in case_id(path).lower() for path in _numbered(source))

    def pairs(self, source: Path) -> Found:
        numbered = _numbered(source)
        labels = {_number(p): p for p in numbered if "segmentation" in case_id(p).lower()}
        pairs, used = [], set()
        for scan in numbered:
            if scan in labels.values():
                continue
            used.add(_number(scan))
            label = labels.get(_number(scan))
            pairs.append(Pair(case_id(scan), scan, (LabelFile(label),) if label else ()))
        alone = [f"{p.name}: a label without its volume" for n, p in labels.items() if n not in used]
        others = sorted(set(image_files(source, "**/*")) - set(numbered))
        return Found(pairs, passed_over=alone + [f"{p.name}: neither volume-N nor segmentation-N" for p in others])


def _numbered(source: Path) -> list[Path]:
    return [p for p in image_files(source, "**/*") if NUMBERED.fullmatch(case_id(p))]


def _number(path: Path) -> tuple[str, int]:
    match = NUMBERED.fullmatch(case_id(path))
    assert match is not None  # noqa: S101 - only numbered files come here
    return (match[1] or "").lower(), int(match[3])
