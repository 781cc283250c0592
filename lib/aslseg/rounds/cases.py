"""The frozen cases of a round: who trains, who judges, who waits for a label, and who is left out and why."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from aslseg.cases.prepare import PreparedStore, Spacing, working_spacing
from aslseg.cases.prepared import Prepared
from aslseg.cases.split import split
from aslseg.cases.studies import Case, Studies
from aslseg.compute.weights import read_metadata
from aslseg.errors import BadImageError, NotEnoughCasesError
from aslseg.files import sha256
from aslseg.models.published import find_published
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback, Volume
from aslseg.volume.io import read_image

logger = logging.getLogger(__name__)


@dataclass
class RoundCases:
    """Cases on the working grid by what they are for, with the hashes of their files.

    Attributes:
        train, validation: With a human label.
        unlabelled: Learned from without labels, and may be promoted.
        bystanders: Unlabelled scans of validation patients: predicted, never learned from.
        content: Case to the SHA-256 of its scan.
        labels: Case to the SHA-256 of its human label.
        sources: Case to its files.
        spacing: Working spacing in mm.
        skipped: Case to the reason why it was left out.
        warnings: For the person who started the round.
    """

    spacing: Spacing
    train: list[Prepared] = field(default_factory=list)
    validation: list[Prepared] = field(default_factory=list)
    unlabelled: list[Prepared] = field(default_factory=list)
    bystanders: list[Prepared] = field(default_factory=list)
    content: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Case] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def waiting(self) -> list[Prepared]:
        """Every scan without a human label."""
        return [*self.unlabelled, *self.bystanders]


def prepare_cases(
    studies: Studies, settings: Settings, paths: Paths, before: Collection[str], report: ProgressCallback
) -> RoundCases:
    """Split, read and prepare the cases; what cannot be read is left out with its reason.

    Args:
        studies: The studies folder.
        settings: Window, labels, spacing, ``validation_fraction``.
        paths: Cache, and the published model whose working spacing is kept.
        before: Patients that have judged models before.
        report: Told after each case.

    Raises:
        NotEnoughCasesError: No labelled case that can be read and trained on.
    """
    cases = split(studies, settings.validation_fraction, before)
    listed = {c.id for c in cases}
    cases += [Case(c, p, studies.patients[c], "unlabelled") for c, p in studies.images.items() if c not in listed]
    spacing, unreadable = _spacing([c for c in cases if c.role == "train"], settings, paths)
    team = RoundCases(spacing, skipped=unreadable)
    store = PreparedStore(paths.cache, settings, spacing)
    for done, case in enumerate(cases, 1):
        group = team.bystanders if case.id not in listed else getattr(team, case.role)
        loaded, reasons = store.load_all([] if case.id in unreadable else [case])
        team.skipped |= reasons
        group += loaded
        if loaded:
            team.sources[case.id] = case
            team.content[case.id] = sha256(case.image)
            if case.label:
                team.labels[case.id] = sha256(case.label)
        report(done, len(cases))
    _without_leaks(team)
    _complain(team, studies, settings)
    return team


def _spacing(train: list[Case], settings: Settings, paths: Paths) -> tuple[Spacing, dict[str, str]]:
    """The published model's working spacing, else that of the readable training scans; and who is not readable."""
    model = find_published(paths, "ssl")
    if settings.spacing != "auto":
        return working_spacing([], settings), {}
    if model is not None:
        kept = read_metadata(model.path).get("spacing")
        if kept is not None:
            return tuple(kept), {}
    volumes, bad = [], {}
    for case in train:
        try:
            scan = read_image(case.image, settings.max_voxels)
            # only the geometry is needed; the voxels need not be kept
            volumes.append(Volume(np.broadcast_to(np.float32(0), scan.array.shape), scan.affine))
        except BadImageError as error:
            bad[case.id] = str(error)
    if not volumes:
        raise NotEnoughCasesError(f"no labelled scan can be read: {'; '.join(bad.values())}")
    return working_spacing(volumes, settings), bad


def _without_leaks(team: RoundCases) -> None:
    """Leave out copies of validation scans under other names, same file or same voxels."""
    judges = {_voxels(c): c.id for c in team.validation}
    for group in (team.train, team.unlabelled):
        for case in [c for c in group if judges and _voxels(c) in judges]:
            group.remove(case)
            team.skipped[case.id] = (
                f"{case.id}: same voxels as the validation case {judges[_voxels(case)]}; a copy of a validation scan "
                "is never trained on"
            )


def _voxels(case: Prepared) -> str:
    return hashlib.sha256(np.ascontiguousarray(case.image).data).hexdigest()


def _complain(team: RoundCases, studies: Studies, settings: Settings) -> None:
    if not team.train:
        reasons = "; ".join(r for c, r in team.skipped.items() if c in studies.final)
        raise NotEnoughCasesError(f"{studies.root}: no labelled case can be trained on: {reasons or 'none found'}")
    if not team.validation:
        team.warnings.append(
            "no validation cases: a published model can't be replaced until labels of another patient are submitted"
        )
    if not team.unlabelled:
        team.warnings.append("no unlabelled scans: nothing is ranked or promoted; add scans to the studies folder")
    for name, value in settings.label_set.values.items():
        if not _holds(value, team.train):
            team.warnings.append(
                f"no training label holds {name!r}: it cannot be learned; label it in at least one scan or take it "
                "out of labels"
            )
    for warning in team.warnings:
        logger.warning("%s", warning)


def _holds(value: int, cases: Iterable[Prepared]) -> bool:
    return any(bool((np.asarray(c.label) == value).any()) for c in cases if c.label is not None)
