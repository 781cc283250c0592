"""nnU-Net: ``imagesTr/case_0000.nii.gz`` with a number for each channel, ``labelsTr/case.nii.gz``.

https://github.com/MIC-DKFZ/nnUNet (documentation, dataset format)
"""

from __future__ import annotations

import re
from pathlib import Path

from aslseg.cases.importing.layouts.decathlon import label_names
from aslseg.cases.importing.pairs import Found, LabelFile, Pair, by_key, image_files
from aslseg.volume.io import case_id

CHANNEL = re.compile(r"(.+)_\d{4}")


class NnUNet:
    """The raw data format of nnU-Net; several channels of a case are a question to the user."""

    title = "nnU-Net"

    def recognise(self, source: Path) -> bool:
        scans = image_files(source / "imagesTr")
        return bool(scans) and all(CHANNEL.fullmatch(case_id(s)) for s in scans)

    def pairs(self, source: Path) -> Found:
        labels = by_key(image_files(source / "labelsTr") + image_files(source / "labelsTs"), case_id)
        pairs, used = [], set()
        for scan in image_files(source / "imagesTr") + image_files(source / "imagesTs"):
            match = CHANNEL.fullmatch(case_id(scan))
            case = match[1] if match else case_id(scan)
            used.add(case)
            pairs.append(Pair(case, scan, tuple(map(LabelFile, labels.get(case, [])))))
        alone = [
            f"{p.name}: a label, but no scan is called {c}_0000" for c in labels if c not in used for p in labels[c]
        ]
        return Found(pairs, label_names(source / "dataset.json"), alone)
