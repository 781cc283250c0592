"""The cases of a round: which are trained on, which validate, which have no label, and which are left out and why."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from aslseg.cases.intensity_check import unusual_intensities
from aslseg.cases.prepare import PreparedStore, Spacing, working_spacing
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.relative import outermost
from aslseg.cases.scan_likeness import unlike_labelled
from aslseg.cases.split import split
from aslseg.cases.studies import Case, Studies
from aslseg.compute.weights import read_metadata
from aslseg.errors import BadImageError, NotEnoughCasesError
from aslseg.files import FileHashes
from aslseg.models.kinds import ModelKind
from aslseg.models.published import find_published, manifest
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.settings import Paths, Settings
from aslseg.ssl import nested
from aslseg.types import ProgressCallback, Volume
from aslseg.volume.io import read_image

logger = logging.getLogger(__name__)


@dataclass
class RoundCases:
    """Cases on the working grid, by their use.

    Attributes:
        spacing: Working spacing in mm along x, y, z; None for that of the scans.
        train: With a human label; trained on.
        validation: With a human label; never trained on.
        unlabelled: Trained on without labels; their masks may be promoted.
        predict_only: Unlabelled scans of validation patients; predicted, never trained on.
        sources: Case id to its files.
        skipped: Case id to the reason why it was left out.
        unlike: Case id of unlabelled scans whose masks are not promoted, to the reason
            (:mod:`aslseg.cases.scan_likeness`).
        warnings: For the person who started the round.
        hashes: Of the files, kept for the length of the round.
    """

    spacing: Spacing
    train: list[Prepared] = field(default_factory=list)
    validation: list[Prepared] = field(default_factory=list)
    unlabelled: list[Prepared] = field(default_factory=list)
    predict_only: list[Prepared] = field(default_factory=list)
    sources: dict[str, Case] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unlike: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    hashes: FileHashes = field(default_factory=FileHashes)

    @property
    def without_label(self) -> list[Prepared]:
        """Every scan without a human label."""
        return [*self.unlabelled, *self.predict_only]

    @property
    def predicted(self) -> list[Prepared]:
        """Every scan whose mask a round needs."""
        return [*self.without_label, *self.validation]


def prepare_cases(
    studies: Studies,
    settings: Settings,
    paths: Paths,
    before: Collection[str],
    report: ProgressCallback,
    trained: Collection[str] = (),
) -> RoundCases:
    """Split, read and prepare the cases; cases that cannot be read are left out with their reason.

    Args:
        studies: The studies folder.
        settings: Window, labels, spacing, ``validation_fraction``.
        paths: Cache, and the published model whose working spacing is kept.
        before: Patients that have validated models before.
        report: Called with (done, total) after each case.
        trained: Cases that a published model was ever trained on; none of them becomes a validation case.

    Raises:
        NotEnoughCasesError: No labelled case can be read and trained on.
    """
    listed = split(studies, settings.validation_fraction, before, trained)
    known = {c.id for c in listed}
    others = [Case(c, p, studies.patients[c], "unlabelled") for c, p in studies.images.items() if c not in known]
    spacing, unreadable = _spacing([c for c in listed if c.role == "train"], settings, paths)
    cases = RoundCases(spacing, skipped=unreadable)
    store = PreparedStore(paths.cache, settings, spacing, cases.hashes)
    for done, case in enumerate([*listed, *others], 1):
        group = getattr(cases, case.role) if case.id in known else cases.predict_only
        loaded, reasons = store.load_all([] if case.id in unreadable else [case])
        cases.skipped |= reasons
        cases.sources |= {c.id: case for c in loaded}
        group += loaded
        report(done, len(listed) + len(others))
    store.prune()
    _leave_out_unusual(cases, studies, settings)
    _leave_out_copies(cases)
    _leave_out_without_parent(cases, settings)
    cases.unlike = unlike_labelled([*cases.train, *cases.validation], cases.without_label, studies.confirmed)
    _check(cases, studies, settings)
    return cases


def trained_before(ledger: Ledger, paths: Paths) -> set[str]:
    """Cases that any published model was ever trained on, as manifest and ledger say."""
    manifests = [manifest(paths), *(e.details["after"] for e in ledger.events(kinds=("published",)))]
    return {case for models in manifests for entry in models.values() for case in entry.get("trained_on", ())}


def _spacing(train: list[Case], settings: Settings, paths: Paths) -> tuple[Spacing, dict[str, str]]:
    """The published model's working spacing, else that of the readable training scans; and why others are not."""
    model = find_published(paths, ModelKind.SSL)
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


def _leave_out_unusual(cases: RoundCases, studies: Studies, settings: Settings) -> None:
    """Leave out scans whose intensities no person has confirmed; see :mod:`aslseg.cases.intensity_check`."""
    labelled = [*cases.train, *cases.validation]
    found, warnings = unusual_intensities(labelled, cases.without_label, settings, studies.confirmed)
    cases.warnings += warnings
    cases.skipped |= found
    for group in (cases.train, cases.validation, cases.unlabelled, cases.predict_only):
        group[:] = [c for c in group if c.id not in found]
    for reason in found.values():
        logger.warning("skipped case %s", reason)


def _leave_out_copies(cases: RoundCases) -> None:
    """Leave out copies of validation scans under other names: the same file or the same voxels."""
    validation = {_voxel_hash(c): c.id for c in cases.validation}
    for group in (cases.train, cases.unlabelled) if validation else ():
        for case in list(group):
            copied = validation.get(_voxel_hash(case))
            if copied is None:
                continue
            group.remove(case)
            cases.skipped[case.id] = (
                f"{case.id}: same voxels as the validation case {copied}; a copy of a validation scan is never "
                "trained on"
            )


def _leave_out_without_parent(cases: RoundCases, settings: Settings) -> None:
    """Leave out labels that show something nested but not its parent, where others show the parent.

    To every network they would say that the lesion is all there is of the organ, and as validation that a model which
    finds the organ is wrong. Where nobody has drawn the parent, nothing of it is learned, and the labels are as good
    as any.
    """
    for branch in nested.branches(settings.label_set):
        if not _any_holds(branch.values[0], cases.train):
            continue
        for group in (cases.train, cases.validation):
            for case in list(group):
                reason = nested.without_parent(case, branch, settings.label_set)
                if reason:
                    group.remove(case)
                    cases.skipped[case.id] = reason
                    logger.warning("skipped case %s", reason)


def _voxel_hash(case: Prepared) -> str:
    return hashlib.sha256(np.ascontiguousarray(case.image).data).hexdigest()


def _check(cases: RoundCases, studies: Studies, settings: Settings) -> None:
    if not cases.train:
        reasons = "; ".join(r for c, r in cases.skipped.items() if c in studies.final)
        raise NotEnoughCasesError(f"{studies.root}: no labelled case can be trained on: {reasons or 'none found'}")
    if not cases.validation:
        cases.warnings.append(
            "no validation cases: nothing says how good a new model is; a published one is replaced only when there "
            "are more human labels. Submit a label of another patient"
        )
    if not cases.unlabelled:
        cases.warnings.append("no unlabelled scans: nothing is ranked or promoted; add scans to the studies folder")
    cases.warnings += _about_labels(cases, settings)
    for warning in cases.warnings:
        logger.warning("%s", warning)


def _about_labels(cases: RoundCases, settings: Settings) -> list[str]:
    """What is missing in the labels that are trained on."""
    labels, found = settings.label_set, []
    outer = outermost(labels)
    held = [_any_holds(value, cases.train) for value in labels.values.values()]
    synthetic = bool(settings.nested_fraction and settings.nested_synthetic)
    for n, name in enumerate(labels.names):
        parent = outer[n]
        if not held[n] and synthetic and parent is not None and held[parent]:
            found.append(
                f"no training label holds {name!r}: it is learned from synthetic ones alone (nested_synthetic); label "
                "it in at least one scan"
            )
        elif not held[n]:
            found.append(
                f"no training label holds {name!r}: it cannot be learned; label it in at least one scan or take it "
                "out of labels"
            )
    return found


def _any_holds(value: int, cases: Iterable[Prepared]) -> bool:
    return any(bool((np.asarray(c.label) == value).any()) for c in cases if c.label is not None)
