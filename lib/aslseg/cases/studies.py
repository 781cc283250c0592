"""What lies in a MONAI Label studies folder, read-only.

Layout: scans flat in the folder, ``labels/<tag>/<id>.nii.gz``, tags ``final`` (human), ``original`` (best machine
mask) and ``aslseg_pseudo`` (promoted). An optional ``patients.csv`` with the columns ``case,patient[,role]`` names
the patient of each scan, and may fix a patient's role to ``train`` or ``validation``.
"""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aslseg.errors import NotEnoughCasesError
from aslseg.volume.io import case_id, extension

logger = logging.getLogger(__name__)

FINAL, ORIGINAL, PSEUDO = "final", "original", "aslseg_pseudo"


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
        problems: Files passed over, with the reason.
    """

    root: Path
    images: dict[str, Path]
    final: dict[str, Path]
    patients: dict[str, str]
    fixed_roles: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def label_path(self, tag: str, case: str) -> Path:
        """Where a label with a tag is written."""
        return self.root / "labels" / tag / f"{case}.nii.gz"


def read_studies(root: Path) -> Studies:
    """List a studies folder.

    Raises:
        NotEnoughCasesError: The folder is missing or holds no scan.
    """
    if not root.is_dir():
        raise NotEnoughCasesError(f"{root}: no such folder; give a folder of NIfTI or NRRD scans with --studies")
    images, problems = _images(root)
    if not images:
        raise NotEnoughCasesError(f"{root}: no scans (.nii.gz, .nii, .nrrd, .mha) directly in this folder")
    final, unmatched = _images(root / "labels" / FINAL)
    for case in sorted(set(final) - set(images)):
        unmatched.append(f"labels/{FINAL}/{final.pop(case).name}: no scan {case!r} in the folder")
    patients, roles, complaints = _patients(root / "patients.csv", set(images))
    problems += unmatched + complaints
    for problem in problems:
        logger.warning("passed over: %s", problem)
    return Studies(root, images, final, {c: patients.get(c, c) for c in images}, roles, tuple(problems))


def _images(folder: Path) -> tuple[dict[str, Path], list[str]]:
    found: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if extension(path) is None or not path.is_file():
            continue
        case = case_id(path)
        if case in found:
            problems.append(f"{path.name}: {found[case].name} has the same id; keep one of them")
        else:
            found[case] = path
    return dict(sorted(found.items())), problems


def _patients(path: Path, known: set[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    patients: dict[str, str] = {}
    roles: dict[str, str] = {}
    problems: list[str] = []
    if not path.is_file():
        return patients, roles, problems
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"case", "patient"} <= set(reader.fieldnames or []):
            return patients, roles, [f"{path.name}: expected the columns case,patient[,role]"]
        for row in reader:
            case, patient, role = (row.get(c) or "" for c in ("case", "patient", "role"))
            if case not in known or not patient:
                problems.append(f"{path.name}: line {reader.line_num}: no scan {case!r} or empty patient")
                continue
            patients[case] = patient
            if role in ("train", "validation"):
                if roles.setdefault(patient, role) != role:
                    problems.append(f"{path.name}: patient {patient!r} has two roles; kept {roles[patient]!r}")
            elif role:
                problems.append(f"{path.name}: line {reader.line_num}: role {role!r}; expected train or validation")
    return patients, roles, problems
