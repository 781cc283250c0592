"""What lies in a MONAI Label studies folder, read-only.

Layout: scans flat in the folder, ``labels/<tag>/<id>.nii.gz``, tags ``final`` (human), ``original`` (best machine
mask) and ``aslseg_pseudo`` (promoted). An optional ``patients.csv`` with the columns
``case,patient[,role][,intensities]`` names the patient of each scan, may fix a patient's role to ``train`` or
``validation``, and confirms scans whose intensities look unusual (:mod:`aslseg.cases.intensity_check`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Literal

from aslseg.cases.patients import read_patients
from aslseg.errors import NotEnoughCasesError
from aslseg.volume.io import case_id, extension

logger = logging.getLogger(__name__)

FINAL, ORIGINAL, PSEUDO = "final", "original", "aslseg_pseudo"
# the names that segmentations have beside their scans; LiTS calls the scan volume-3 and its label segmentation-3
LABEL_SUFFIX = re.compile(r"[_.-](seg|segmentation|labels?|labelmap|mask|gt)$", re.IGNORECASE)
LITS_LABEL = re.compile(r"^segmentation(?=-\d+$)", re.IGNORECASE)

KNOWN_NAMES = 1 << 15
"""What follows from the name of a file is known for so many: a page lists ten thousand again when one was added."""
SUGGESTED = 5
"""Of so many labels without a scan the nearest name is looked for: each takes 20 ms among ten thousand scans."""

Role = Literal["train", "validation", "unlabelled"]


@dataclass(frozen=True)
class Case:
    """One scan of the studies folder.

    Attributes:
        id: Image id in the datastore (file name without extension).
        image: The scan's file.
        patient: Scans of one patient never stand on both sides of a split.
        role: ``train`` and ``validation`` have a human label, ``unlabelled`` has none that may be read.
        label: The human label's file; None for unlabelled cases.
    """

    id: str
    image: Path
    patient: str
    role: Role
    label: Path | None = None


@dataclass(frozen=True)
class Studies:
    """Scans and human labels of a studies folder.

    Attributes:
        root: The folder.
        images: Image id to file, sorted by id.
        final: Image id to human label.
        patients: Image id to patient; the id itself where nothing else is known.
        fixed_roles: Patient to ``train`` or ``validation`` where patients.csv says so.
        confirmed: Image ids whose intensities a person has confirmed.
        problems: Files passed over, with the reason.
    """

    root: Path
    images: dict[str, Path]
    final: dict[str, Path]
    patients: dict[str, str]
    fixed_roles: dict[str, str] = field(default_factory=dict)
    confirmed: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()

    def label_path(self, tag: str, case: str) -> Path:
        """Where a label with a tag is written."""
        return self.root / "labels" / tag / f"{case}.nii.gz"


@dataclass(frozen=True)
class Scans:
    """The scans of a studies folder by their id, and files passed over, with the reason."""

    images: dict[str, Path]
    problems: tuple[str, ...]


def read_scans(root: Path) -> Scans:
    """List the scans of a studies folder.

    Raises:
        NotEnoughCasesError: The folder is missing or holds no scan.
    """
    if not root.is_dir():
        raise NotEnoughCasesError(f"{root}: no such folder; give a folder of NIfTI or NRRD scans with --studies")
    images, problems = _images(root)
    for case, reason in segmentations(images).items():
        problems.append(f"{images.pop(case).name}: {reason}")
    if not images:
        raise NotEnoughCasesError(
            f"{root}: no scans (.nii.gz, .nii, .nrrd, .mha) directly in this folder{_elsewhere(root, problems)}"
        )
    return Scans(images, tuple(problems))


def read_studies(root: Path, scans: Scans | None = None) -> Studies:
    """List a studies folder.

    Args:
        root: The folder.
        scans: Its scans, if they were listed before.

    Raises:
        NotEnoughCasesError: The folder is missing or holds no scan.
        BadSettingsError: A line of patients.csv that cannot be understood.
    """
    scans = scans or read_scans(root)
    images, problems = scans.images, list(scans.problems)
    final, unmatched = _images(root / "labels" / FINAL)
    for number, case in enumerate(sorted(set(final) - set(images))):
        near = _close(case, images) if number < SUGGESTED else ""
        unmatched.append(f"labels/{FINAL}/{final.pop(case).name}: no scan {case!r} in the folder{near}")
    table = read_patients(root / "patients.csv", images)
    problems += unmatched + table.problems
    for problem in problems:
        logger.warning("passed over: %s", problem)
    return Studies(
        root,
        images,
        final,
        {c: table.patients.get(c, c) for c in images},
        table.roles,
        frozenset(table.confirmed),
        tuple(problems),
    )


def segmentations(images: Mapping[str, Path]) -> dict[str, str]:
    """Which files of a studies folder are segmentations by their name, and why, by their id.

    A ``.seg.nrrd`` is one; ``x_seg``, ``x_label`` or ``x-mask`` are where there is a scan ``x`` too.
    """
    found = {}
    for case, path in images.items():
        owners = possible_scans(path.name)
        if owners == ():
            continue
        owner = next((o for o in owners or () if o in images), None)
        if owners is None:
            found[case] = f"a segmentation, not a scan; move it to labels/{FINAL} under the name of its scan"
        elif owner is not None:
            found[case] = f"looks like a segmentation of {owner!r}; move it to labels/{FINAL}/{owner}{extension(path)}"
    return found


@lru_cache(maxsize=KNOWN_NAMES)
def possible_scans(name: str) -> tuple[str, ...] | None:
    """Of which scans a file is a segmentation by its name, if there is one of these; None for one in any case."""
    if name.lower().endswith(".seg.nrrd"):
        return None
    case = case_id(Path(name))
    if not (LABEL_SUFFIX.search(case) or LITS_LABEL.search(case)):
        return ()
    return tuple(o for o in (LABEL_SUFFIX.sub("", case), LITS_LABEL.sub("volume", case)) if o != case)


def _images(folder: Path) -> tuple[dict[str, Path], list[str]]:
    found: dict[str, Path] = {}
    problems = []
    for entry in _entries(folder):
        path, case = _image(folder, entry.name)
        if case is None:
            continue
        if entry.is_symlink() and not path.exists():
            problems.append(
                f"{path.name}: a link to {path.readlink()}, which is not there; mount its disk or fetch the file"
            )
            continue
        if not entry.is_file():
            continue
        if not is_utf8(entry.name):
            problems.append(f"{entry.name!r}: not a name in UTF-8; rename it, for example with convmv")
            continue
        if case in found:
            problems.append(f"{path.name}: {found[case].name} has the same id; keep one of them")
        else:
            found[case] = path
    return dict(sorted(found.items())), problems


@lru_cache(maxsize=KNOWN_NAMES)
def _image(folder: Path, name: str) -> tuple[Path, str | None]:
    """The path of an entry of a folder and its id; None if it is no image by its name."""
    path = folder / name
    return path, case_id(path) if extension(path) else None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; an entry knows its kind without asking the disk again."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_utf8(name: str) -> bool:
    """Whether a file name can be written into JSON and the ledger; names from old disks may be in another encoding."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _elsewhere(root: Path, problems: list[str]) -> str:
    """What a folder without scans holds instead."""
    below = sorted({p.parent.name for p in root.glob("*/*") if extension(p) and p.parent.name != "labels"})
    parts = problems[:3] + ([f"images lie in its sub-folders {', '.join(below[:3])}"] if below else [])
    return f"; {'; '.join(parts)}" if parts else ""


def _close(case: str, images: Iterable[str]) -> str:
    near = get_close_matches(case, list(images), n=1, cutoff=0.8)
    return f"; did you mean {near[0]!r}?" if near else ""
