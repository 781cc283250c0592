"""BIDS: ``sub-01/[ses-1/]anat/sub-01_T1w.nii.gz``, labels in ``derivatives``.

https://bids-specification.readthedocs.io/en/stable/derivatives/imaging.html#segmentations
"""

from __future__ import annotations

import csv
from pathlib import Path

from aslseg.cases.importing.pairs import Found, LabelFile, Pair, image_files
from aslseg.errors import BadSettingsError
from aslseg.volume.io import case_id

DATATYPES = ("anat", "ct", "pet")
SEGMENTATIONS = ("dseg", "mask", "seg", "probseg")
# what a derivative adds to the name of its scan
ADDED = {"desc", "label", "space", "res", "den", "seg", "atlas"}


class Bids:
    """The Brain Imaging Data Structure; several contrasts of a session are a question to the user."""

    title = "BIDS"

    def recognise(self, source: Path) -> bool:
        return any(image_files(subject, "**/*") for subject in source.glob("sub-*") if subject.is_dir())

    def pairs(self, source: Path) -> Found:
        files = [p for subject in sorted(source.glob("sub-*")) for p in image_files(subject, "**/*")]
        scans = [p for p in files if p.parent.name in DATATYPES and _suffix(p) not in SEGMENTATIONS]
        labels = [p for p in files if p not in scans and p.parent.name in DATATYPES]
        derived = image_files(source / "derivatives", "**/*")
        labels += [p for p in derived if _suffix(p) in SEGMENTATIONS[:-1]]
        pairs, names = [], {}
        for scan in scans:
            own = tuple(_label(p) for p in labels if _belongs(p, scan, scans))
            patient = f"sub-{_entities(scan).get('sub', '')}"
            pairs.append(Pair("_".join(case_id(scan).split("_")[:-1]), scan, own, patient))
        for path in labels:
            names.update(_names(path))
        used = {label.path for pair in pairs for label in pair.labels}
        return Found(
            pairs, names, [f"{p.name}: a label, but no scan has its entities" for p in labels if p not in used]
        )


def _entities(path: Path) -> dict[str, str]:
    """``sub-01_ses-2_T1w`` to ``{"sub": "01", "ses": "2"}``."""
    return dict(part.split("-", 1) for part in case_id(path).split("_") if "-" in part)


def _suffix(path: Path) -> str:
    return case_id(path).split("_")[-1]


def _belongs(label: Path, scan: Path, scans: list[Path]) -> bool:
    """Whether a label is that of a scan: equal entities, and no other scan shares more of them."""
    drawn = {k: v for k, v in _entities(label).items() if k not in ADDED}
    alike = [s for s in scans if set(_entities(s).items()) <= set(drawn.items())]
    most = max((len(_entities(s)) for s in alike), default=0)
    return scan in alike and len(_entities(scan)) == most


def _label(path: Path) -> LabelFile:
    return LabelFile(path, _entities(path).get("label", "") if _suffix(path) == "mask" else "")


def _names(path: Path) -> dict[int, str]:
    """Value to name from the table that goes with a segmentation, in its folder or at the root of the data set."""
    stem = case_id(path)
    tables = [path.with_name(f"{stem}.tsv"), *(p / "dseg.tsv" for p in path.parents[:4])]
    table = next((t for t in tables if t.is_file()), None)
    if table is None or _suffix(path) != "dseg":
        return {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        try:
            found = {int(row["index"]): row["name"] for row in csv.DictReader(file, delimiter="\t")}
        except (KeyError, ValueError, TypeError):
            raise BadSettingsError(f"{table}: expected the columns index and name, separated by tabs") from None
    return {value: name for value, name in found.items() if value != 0 and name}
