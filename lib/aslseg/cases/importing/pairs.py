"""Scans with their labels as a layout finds them, and the names by which they find each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from aslseg.volume.dicom_series import Series
from aslseg.volume.io import case_id, extension

LABEL_WORDS = r"segmentations?|segs?|labels?|labelmap|masks?|gt|roi|annotations?"
SCAN_WORDS = r"images?|img|scan|volume|vol|ct|mri?"
LABEL_SUFFIX = re.compile(rf"(?i)(.+?)[ _.-]+({LABEL_WORDS})")
LABEL_NAME = re.compile(rf"(?i)({LABEL_WORDS})([ _.-].*)?")
SCAN_SUFFIX = re.compile(rf"(?i)(.+?)[ _.-]+({SCAN_WORDS})")


@dataclass(frozen=True)
class LabelFile:
    """A label as it was found.

    Attributes:
        path: Image file.
        name: What its voxels other than 0 are; empty where the values of the voxels say it.
    """

    path: Path
    name: str = ""


@dataclass(frozen=True)
class Pair:
    """A scan, and what labels it.

    Attributes:
        case: Its id; empty where it must be made from the patient and the series.
        scan: Image file or DICOM series.
        labels: None, a label map, or a file for each label.
        patient: Empty where nothing is known.
        role: ``train``, ``validation`` or nothing, as the ``patients.csv`` of the source says.
        confirmed: Whether that table confirms its intensities.
    """

    case: str
    scan: Path | Series
    labels: tuple[LabelFile, ...] = ()
    patient: str = ""
    role: str = ""
    confirmed: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the scan."""
        if isinstance(self.scan, Path):
            return (self.scan,)
        return tuple(dict.fromkeys(s.path for s in self.scan.slices))


@dataclass(frozen=True)
class Found:
    """What lies in a folder.

    Attributes:
        pairs: Scans with their labels. Two of one case, and a label of two scans, are a question to the user.
        names: Label value to name, where the layout says so.
        passed_over: Files that are neither, with the reason.
    """

    pairs: list[Pair]
    names: Mapping[int, str] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)


class Layout(Protocol):
    """A way to keep scans and labels in folders.

    Attributes:
        title: As people call it.
    """

    title: str

    def recognise(self, source: Path) -> bool:
        """Whether a folder is laid out like this; looks at names, and opens as little as possible."""

    def pairs(self, source: Path) -> Found:
        """Its scans and labels."""


def image_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Image files in a folder, or below it with the pattern ``**/*``, sorted; hidden ones are left out."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.glob(pattern) if extension(p) and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def labelled_stem(path: Path) -> str:
    """``liver_01_seg.nii.gz`` to ``liver_01``; empty if the name is not that of a label."""
    match = LABEL_SUFFIX.fullmatch(case_id(path))
    return match[1] if match else ""


def is_label_name(path: Path) -> bool:
    """Whether a file is called like a label: ``x_seg.nii.gz``, ``mask.nii.gz``, ``x.seg.nrrd``."""
    stem = case_id(path)
    return bool(LABEL_SUFFIX.fullmatch(stem) or LABEL_NAME.fullmatch(stem)) or extension(path) == ".seg.nrrd"


def plain_stem(path: Path) -> str:
    """The name of a scan or a label without the word that says which it is."""
    stem = labelled_stem(path) or case_id(path)
    match = SCAN_SUFFIX.fullmatch(stem)
    return match[1] if match else stem


def by_key(paths: Iterable[Path], key: Callable[[Path], Hashable]) -> dict[Hashable, list[Path]]:
    """Files by what is equal in their names; none displaces another."""
    found: dict[Hashable, list[Path]] = {}
    for path in paths:
        found.setdefault(key(path), []).append(path)
    return found


def pair_by_name(scans: Iterable[Path], labels: Iterable[Path]) -> Found:
    """Pair every label with the scan of its name; the exact name first, then the name without words like ``_ct``.

    Returns:
        A label goes to each scan that it may be of; several are a question to the user.
    """
    scans = list(scans)
    exact, plain = by_key(scans, case_id), by_key(scans, plain_stem)
    matched: dict[Path, list[LabelFile]] = {s: [] for s in scans}
    passed_over = []
    for label in labels:
        stem = labelled_stem(label)
        own = exact.get(case_id(label)) or exact.get(stem) or plain.get(plain_stem(label), [])
        if not own:
            passed_over.append(f"{label.name}: a label, but no scan is called {stem or case_id(label)!r}")
        for scan in own:
            matched[scan].append(LabelFile(label))
    return Found([Pair(case_id(s), s, tuple(files)) for s, files in matched.items()], passed_over=passed_over)
