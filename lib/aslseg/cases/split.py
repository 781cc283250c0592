"""The split into training and validation: by patient, by a stable hash, human labels only."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from aslseg.cases.studies import Case, Studies
from aslseg.errors import NotEnoughCasesError


def hash_fraction(patient: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64


def validation_patients(
    labelled: Iterable[str],
    fraction: float,
    fixed: dict[str, str],
    before: Collection[str] = (),
    trained: Collection[str] = (),
) -> set[str]:
    """Choose the patients whose labels judge models and are never trained on.

    A patient once chosen (``before``) stays chosen, so that labels saved later cannot move it into training.
    Patients whose hash lies below ``fraction`` are chosen; if that leaves none and there are two or more, the one
    with the lowest hash is. A patient that a published model was trained on is never chosen: it would judge a model
    on what that has seen. At least one labelled patient always remains for training.

    Args:
        labelled: Patients with a human label.
        fraction: Setting ``validation_fraction``.
        fixed: Patient to ``train`` or ``validation``, which overrules everything.
        before: Patients chosen in earlier rounds (from the ledger).
        trained: Patients whose scans a published model was ever trained on.
    """
    patients = sorted(set(labelled), key=lambda p: (hash_fraction(p), p))
    chosen = {p for p in patients if fixed.get(p) == "validation" or (p in before and p not in fixed)}
    if fraction > 0:
        free = [p for p in patients if p not in fixed and p not in chosen and p not in trained]
        chosen |= {p for p in free if hash_fraction(p) < fraction}
        if not chosen - set(trained) and len(patients) > 1 and free:
            chosen.add(free[0])
    keep = [p for p in patients if p not in chosen]
    if not keep and patients:
        movable = [p for p in patients if p not in before and fixed.get(p) != "validation"]
        chosen -= {(movable or patients)[-1]}
    return chosen


def split(studies: Studies, fraction: float, before: Collection[str] = (), trained: Collection[str] = ()) -> list[Case]:
    """Give every scan its role.

    Unlabelled scans of a validation patient are left out: nothing of that patient may be learned from, also after all
    of its labels were deleted.

    Args:
        studies: The studies folder.
        fraction: Setting ``validation_fraction``.
        before: Patients chosen to validate in earlier rounds.
        trained: Cases that a published model was ever trained on.

    Returns:
        Cases sorted by id.

    Raises:
        NotEnoughCasesError: No scan has a human label.
    """
    if not studies.final:
        raise NotEnoughCasesError(
            f"{studies.root}: no labelled case; draw at least one label in 3D Slicer and submit it, "
            f"or put label files into {studies.root}/labels/final"
        )
    labelled = {studies.patients[c] for c in studies.final}
    learned = {studies.patients[c] for c in trained if c in studies.patients}
    validation = validation_patients(labelled, fraction, studies.fixed_roles, before, learned)
    judged = {p for p in set(before) - labelled if studies.fixed_roles.get(p) != "train"}
    cases = []
    for case, image in studies.images.items():
        patient = studies.patients[case]
        if case in studies.final:
            role = "validation" if patient in validation else "train"
            cases.append(Case(case, image, patient, role, studies.final[case]))  # type: ignore[arg-type]
        elif patient not in validation | judged:
            cases.append(Case(case, image, patient, "unlabelled"))
    return cases
