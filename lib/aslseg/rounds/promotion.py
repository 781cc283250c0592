"""What recipes share once the masks are predicted: assess, promote, retrain, publish, and write what clients see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aslseg.agreement.measures import Agreement, compare
from aslseg.agreement.verdict import Verdict, judge
from aslseg.cases.prepared import Prepared
from aslseg.cases.studies import ORIGINAL, PSEUDO, read_studies
from aslseg.errors import LedgerError
from aslseg.models.files import ModelSet
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.gate import publish_better
from aslseg.rounds.ledger import Score
from aslseg.rounds.masks import plan_label_changes, sync_label_files
from aslseg.rounds.pipeline import Promoted, RoundPipeline
from aslseg.rounds.ranking import settings_key
from aslseg.types import ProgressCallback


@dataclass(frozen=True)
class CaseAssessment:
    """How far the two networks agree on a scan, and whether its mask may be promoted."""

    agreement: Agreement
    verdict: Verdict


@dataclass
class RoundState:
    """What a round has predicted and decided so far.

    Attributes:
        pipeline: The round's cases and steps.
        models: The models before retraining.
        ssl_maps: Region probabilities of the SSL model.
        second_maps: Region probabilities of the network that the SSL model is compared with: the adaptation network,
            or CFR's canvas model.
        source: Whose masks are promoted, for the ledger.
        masks: Region probabilities of the source.
        assessments: By case id, of every scan without a human label.
    """

    pipeline: RoundPipeline
    models: ModelSet
    ssl_maps: CachedProbabilities
    second_maps: CachedProbabilities
    source: str
    masks: CachedProbabilities
    assessments: dict[str, CaseAssessment] = field(default_factory=dict)


Choice = Callable[[RoundState, ProgressCallback], dict[str, dict[str, Any]]]
"""Chooses the cases to promote; case id to its :func:`promotion_details`."""


def conclude(
    state: RoundState,
    dice: dict[str, float | None],
    choose: Choice,
    kinds: Sequence[ModelKind] = PUBLISHED_KINDS,
) -> dict[str, Any]:
    """Do the second half of a round: rank, promote, retrain, publish, and write the masks that clients see.

    Args:
        state: What the first half has predicted.
        dice: Validation Dice so far, for the summary.
        choose: Which cases are promoted.
        kinds: Kinds of model that may be published.

    Returns:
        The summary: validation Dice, source of the masks, promoted cases, what was published and why.
    """
    pipeline, progress, models = state.pipeline, state.pipeline.progress, state.models
    with progress.stage("rank") as report:
        assess(state, report)
    with progress.stage("promote") as report:
        promoted = promote(pipeline, choose(state, report))
    ids = [p.case.id for p in promoted]
    with progress.stage("retrain") as report:
        retrained = pipeline.train_ssl(promoted, report)
    with progress.stage("publish") as report:
        published, lines, gated = publish_better(pipeline, models, retrained, ids, report, kinds)
    with progress.stage("originals") as report:
        shown = write_originals(state, published, report)
    return {
        "validation": dice | gated,
        "source": state.source,
        "shown": shown,
        "promoted": ids,
        "agreement": {case: found.agreement.mean for case, found in sorted(state.assessments.items())},
        "published": lines,
        "models": {kind.value: str(path) for kind, path in models.items()} | {"retrained": str(retrained)},
    }


def assess(
    state: RoundState,
    report: ProgressCallback,
    cases: Sequence[Prepared] | None = None,
    kept: Sequence[Score] = (),
) -> None:
    """Compare both networks' masks of scans without a human label, judge each mask, and record the agreement.

    Everything is measured on the working grid. Fills ``state.assessments`` and replaces the ledger's scores.

    Args:
        state: The round.
        report: Called with (done, total).
        cases: The scans; by default every one without a human label.
        kept: Scores of other scans that stay.
    """
    p = state.pipeline
    cases = p.cases.without_label if cases is None else cases
    settings = settings_key(p.settings)
    for done, case in enumerate(cases, 1):
        agreement = compare(p.decode(state.ssl_maps(case)), p.decode(state.second_maps(case)), p.labels)
        mask = p.decode(state.masks(case))
        verdict = judge(agreement, mask, case.grid.spacing, p.reference, p.settings, case.image.shape)
        state.assessments[case.id] = CaseAssessment(agreement, verdict)
        report(done, len(cases))
    measured = [
        Score(
            case,
            p.number,
            found.agreement.mean,
            {
                "per_label": found.agreement.per_label,
                "flags": list(found.agreement.flags),
                "promote": found.verdict.promote,
                "reasons": list(found.verdict.reasons),
                "models": state.models.hashes,
                "settings": settings,
            },
        )
        for case, found in state.assessments.items()
    ]
    p.ledger.set_scores([*kept, *measured])


def promotion_details(
    state: RoundState, case: Prepared, disagreement: np.ndarray, thresholds: dict[str, float]
) -> dict[str, Any]:
    """Keep the mask of a case; returns what the ledger says of its promotion.

    Args:
        state: The round.
        case: The case.
        disagreement: (i, j, k) bool on the working grid, where the two networks differ.
        thresholds: Agreement that was asked of each label.
    """
    p = state.pipeline
    return {
        "sha256": keep_mask(p, case, state.masks),
        "disagreement": p.masks.add(case.grid.to_native(disagreement.astype(np.float32)) >= 0.5, case.grid.affine),
        "image": case.image_hash,
        "source": state.source,
        "agreement": state.assessments[case.id].agreement.per_label,
        "threshold": thresholds,
        "models": state.models.hashes,
    }


def promote(pipeline: RoundPipeline, wanted: dict[str, dict[str, Any]]) -> list[Promoted]:
    """Promote masks, in the ledger first and then as label files.

    Args:
        pipeline: The round's cases and steps.
        wanted: Case id to its :func:`promotion_details`.

    Returns:
        The promoted cases, without those that a human has labelled meanwhile.
    """
    cases = {c.id: c for c in pipeline.cases.unlabelled}
    record(pipeline, PSEUDO, wanted)
    now = pipeline.ledger.masks(PSEUDO)
    return [pipeline.promoted(cases[n], d) for n, d in sorted(wanted.items()) if n in now and now[n].kind == "mask"]


def record(pipeline: RoundPipeline, tag: str, wanted: dict[str, dict[str, Any]]) -> None:
    """Append to the ledger what changes for a tag, then bring the label files in line.

    Args:
        pipeline: The round.
        tag: ``original`` or ``aslseg_pseudo``.
        wanted: Case id to details with ``sha256``.

    Raises:
        LedgerError: This is no round, or it has no studies folder.
    """
    if pipeline.paths.studies is None or pipeline.number is None:
        raise LedgerError("label files are recorded by a round on a studies folder; run one with --studies DIR")
    studies = read_studies(pipeline.paths.studies)
    pipeline.ledger.append(plan_label_changes(pipeline.ledger, studies, tag, pipeline.number, wanted))
    sync_label_files(pipeline.ledger, studies, pipeline.paths)


def keep_mask(pipeline: RoundPipeline, case: Prepared, masks: CachedProbabilities) -> str:
    """Keep a case's mask on its scan's own grid; returns the SHA-256 of its file."""
    return pipeline.masks.add(case.grid.regions_to_native(masks(case), pipeline.labels), case.grid.affine)


def write_originals(state: RoundState, published: ModelSet, report: ProgressCallback) -> str:
    """Write the best current mask of every scan without a human label to ``labels/original``, ledger first.

    Args:
        state: The round.
        published: The models that are published now.
        report: Called with (done, total).

    Returns:
        Whose masks these are: the round's source, or ``published ssl`` where that validates better.
    """
    p = state.pipeline
    shown, masks = _best_masks(state, published)
    cases = p.cases.without_label
    p.fill(masks, cases, report)
    promoted = {c for c, e in p.ledger.masks(PSEUDO).items() if e.kind == "mask"}
    wanted = {}
    for done, case in enumerate(cases, 1):
        agreement = state.assessments[case.id].agreement
        wanted[case.id] = {
            "sha256": keep_mask(p, case, masks),
            "image": case.image_hash,
            "source": shown,
            "params": {"label_names": p.labels.values},
            "agreement": agreement.mean,
            "per_label": agreement.per_label,
            "promoted": case.id in promoted,
            "models": published.hashes,
        }
        report(done, len(cases))
    record(p, ORIGINAL, wanted)
    return shown


def _best_masks(state: RoundState, published: ModelSet) -> tuple[str, CachedProbabilities]:
    """Whose masks clients see: the round's source, or the published SSL model where it validates better."""
    p = state.pipeline
    model = p.predict(ModelKind.SSL, published)
    ours, theirs = p.dice(state.masks), p.dice(model) if published.spacing == p.cases.spacing else None
    if ours is not None and theirs is not None and theirs > ours:
        return "published ssl", model
    return state.source, state.masks
