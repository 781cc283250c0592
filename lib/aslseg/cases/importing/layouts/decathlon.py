"""Medical Segmentation Decathlon: ``imagesTr``, ``imagesTs``, ``labelsTr``, names in ``dataset.json``.

http://medicaldecathlon.com
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aslseg.cases.importing.pairs import Found, image_files, pair_by_name
from aslseg.errors import BadSettingsError


class Decathlon:
    """The layout of the Medical Segmentation Decathlon."""

    title = "Medical Segmentation Decathlon (MSD)"

    def recognise(self, source: Path) -> bool:
        return (source / "dataset.json").is_file() and bool(image_files(source / "imagesTr"))

    def pairs(self, source: Path) -> Found:
        found = pair_by_name(
            image_files(source / "imagesTr") + image_files(source / "imagesTs"), image_files(source / "labelsTr")
        )
        return Found(found.pairs, label_names(source / "dataset.json"), found.passed_over)


def label_names(path: Path) -> dict[int, str]:
    """Label value to name from a ``dataset.json``; background left out.

    MSD writes ``{"1": "liver"}``, nnU-Net ``{"liver": 1}``.

    Raises:
        BadSettingsError: The file is damaged, or nnU-Net's regions of several values.
    """
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        named: Mapping[str, Any] = content.get("labels", {})
        pairs = [(int(k), str(v)) if k.lstrip("-").isdigit() else (int(v), k) for k, v in named.items()]
    except (ValueError, AttributeError, TypeError) as error:
        raise BadSettingsError(
            f'{path}: expected labels as {{"liver": 1}} or {{"1": "liver"}} ({error}); correct the file, or '
            "remove it and write --map VALUE=LABEL"
        ) from None
    return {value: name for value, name in pairs if value != 0 and name.casefold() != "background"}
