"""LiTS: ``volume-N.nii`` and ``segmentation-N.nii``, in one folder or in several."""

from __future__ import annotations

import re
from pathlib import Path

from aslseg.cases.importing.pairs import Found, LabelFile, Pair, by_key, image_files
from aslseg.volume.io import case_id

NUMBERED = re.compile(r"(?i)(test-)?(volume|segmentation)-(\d+)")


class LiTS:
    """The layout of the Liver Tumour Segmentation challenge, and of others that number their volumes like it."""

    title = "LiTS (volume-N, segmentation-N)"

    def recognise(self, source: Path) -> bool:
        return any("volume" in case_id(path).lower() for path in _numbered(source))

    def pairs(self, source: Path) -> Found:
        numbered = _numbered(source)
        labels = by_key((p for p in numbered if "segmentation" in case_id(p).lower()), _number)
        pairs, used = [], set()
        for scan in numbered:
            own = labels.get(_number(scan), [])
            if scan in own:
                continue
            used.add(_number(scan))
            pairs.append(Pair(case_id(scan), scan, tuple(map(LabelFile, own))))
        alone = [f"{p.name}: a label without its volume" for n in labels if n not in used for p in labels[n]]
        others = sorted(set(image_files(source, "**/*")) - set(numbered))
        return Found(pairs, passed_over=alone + [f"{p.name}: neither volume-N nor segmentation-N" for p in others])


def _numbered(source: Path) -> list[Path]:
    return [p for p in image_files(source, "**/*") if NUMBERED.fullmatch(case_id(p))]


def _number(path: Path) -> tuple[str, int]:
    match = NUMBERED.fullmatch(case_id(path))
    assert match is not None  # noqa: S101 - only numbered files come here
    return (match[1] or "").lower(), int(match[3])
