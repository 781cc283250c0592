"""What recipes share once the masks are predicted: assess, promote, retrain, publish, and write what clients see.

What a round decided on each scan, and why, is made in :mod:`aslseg.rounds.promotion.decisions` and shown by
``aslseg ledger list`` and ``aslseg report``; the rules are in :mod:`aslseg.agreement.promotion_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.agreement.measures import compare
from aslseg.agreement.promotion_rules import judge, without_thresholds
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.errors import LedgerError
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.feedback.late import NOT_USED, REPLACED, drop_late, late_changes
from aslseg.rounds.folds.component_limits import limited
from aslseg.rounds.gate.comparisons import Compared, crossed_differences
from aslseg.rounds.gate.publishing import publish_better
from aslseg.rounds.label_files.masks import plan_label_changes, sync_label_files
from aslseg.rounds.label_files.rollback import withdraw
from aslseg.rounds.ledger.ledger import Ledger, Score
from aslseg.rounds.ledger.vetoes import MASK_VETO, mask_vetoes
from aslseg.rounds.promotion import canaries
from aslseg.rounds.promotion.audit_draw import closest, draw_audits
from aslseg.rounds.promotion.decisions import decide
from aslseg.rounds.promotion.drift import find_drift
from aslseg.rounds.promotion.promises import withdrawn
from aslseg.rounds.promotion.state import CaseAssessment, RoundState
from aslseg.rounds.promotion.stored_scores import settings_key
from aslseg.rounds.steps.artefacts import CachedProbabilities, confidence
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.rounds.steps.promoted import Promoted
from aslseg.types import Labels, ProgressCallback
from aslseg.volume.io import read_image

SAME_MASK = 0.9
"""Dice of each label from which two masks of a scan count as the same one."""

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
        The summary; see :func:`aslseg.rounds.run.run_round`.
    """
    pipeline, progress, models = state.pipeline, state.pipeline.progress, state.models
    with progress.stage("rank") as report:
        state.canaries, state.stops = canaries.watch(pipeline, partial(_assess_one, state), state.floors.unknown)
        assess(state, report)
    with progress.stage("promote") as report:
        wanted = _chosen(state, choose(state, report))
        promoted = promote(pipeline, wanted)
    with progress.stage("retrain") as report:
        promoted = without_late(pipeline, promoted)
        drift = find_drift(pipeline, promoted)
        retrained = limited(pipeline, state.crossed, pipeline.train_ssl(promoted, report))
    learned = {p.case.id: p.mask for p in promoted}
    judged = _compare(state, retrained, list(learned))
    with progress.stage("publish") as report:
        published, lines, gated = publish_better(
            pipeline, models, retrained, list(learned), report, kinds, state.evidence, judged
        )
        rejected = published.sha256(ModelKind.SSL) != pipeline.cases.hashes(retrained)
        settle_promotions(
            pipeline, wanted, learned, rejected, {c: why for c in state.assessments if (why := state.barred(c))}
        )
        promoted = without_late(pipeline, [] if rejected else promoted)
        draw_audits(pipeline, closest(state), lambda case: about_mask(state, case))
    with progress.stage("originals") as report:
        shown, masks = write_originals(state, published, report)
    return {
        "validation": dice | gated,
        "source": state.source,
        "shown": shown,
        "promoted": [p.case.id for p in promoted],
        "withdrawn": sorted(learned) if rejected else [],
        "rejected": rejected,
        "dropped": pipeline.dropped,
        "agreement": {case: found.agreement.mean for case, found in sorted(state.assessments.items())},
        "promise": withdrawn(state.promise) if rejected else state.promise,
        "decisions": decide(state, [p.case.id for p in promoted], learned if rejected else ()),
        "classes": {name: {"dice": d, "cases": n} for name, (d, n) in pipeline.dice_by_label(masks).items()},
        "evidence": state.floors.about,
        "published": lines,
        "canaries": canaries.summarise(state.canaries, state.stops),
        "drift": drift,
        "models": {kind.value: str(path) for kind, path in models.items()} | {"retrained": str(retrained)},
    }


def _chosen(state: RoundState, chosen: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a recipe chose, without masks that were rolled back."""
    wanted = _without_vetoes(state.pipeline, chosen)
    state.refused |= {case: [MASK_VETO] for case in chosen.keys() - wanted.keys()}
    return wanted


def _compare(state: RoundState, retrained: Path, learned: list[str]) -> Compared:
    """What cross-fitting says of the retrained model beside the published one; nothing without folds."""
    if state.crossed is None:
        return Compared()
    with state.pipeline.progress.stage("compare") as report:
        return crossed_differences(state.pipeline, state.crossed, retrained, learned, report, state.floors.unknown)


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
    cases, vetoes = p.cases.without_label if cases is None else cases, mask_vetoes(p.ledger)
    settings = settings_key(p.settings)
    for done, case in enumerate(cases, 1):
        found, mask = _assess_one(state, case)
        verdict = canaries.stopped(found.verdict, mask, p.labels, state.stops)
        if case.id in vetoes and _is_vetoed(p, keep_mask(p, case, state.masks), vetoes[case.id]):
            verdict = verdict.against(MASK_VETO)
        state.assessments[case.id] = replace(found, verdict=verdict)
        report(done, len(cases))
    measured = [
        Score(
            case,
            p.number,
            found.agreement.mean,
            {
                "per_label": found.agreement.per_label,
                "flags": [*found.agreement.flags, *found.verdict.flags],
                "promote": found.verdict.promote,
                "reasons": list(found.verdict.reasons),
                "models": state.models.hashes,
                "settings": settings,
            },
        )
        for case, found in state.assessments.items()
    ]
    p.ledger.set_scores([*kept, *measured])


def _assess_one(state: RoundState, case: Prepared, promised: bool = True) -> tuple[CaseAssessment, np.ndarray]:
    """Compare and judge one case, and its mask (i, j, k), both on the labels that its promotion would teach.

    Args:
        state: The round.
        case: The case.
        promised: Whether the promise may decide in place of a fixed agreement, for labels for which it exists.
    """
    p, unknown = state.pipeline, state.floors.unknown
    first, second, mask = (p.decode(maps(case)) for maps in (state.ssl_maps, state.second_maps, state.masks))
    agreement, learned = compare(first, second, p.labels), None
    if unknown:
        first, second, mask = (p.labels.merge(one, unknown) for one in (first, second, mask))
        learned = compare(first, second, p.labels).without(unknown)
    spacing, shape = case.grid.spacing, case.image.shape
    verdict = judge(learned or agreement, mask, spacing, p.reference, p.settings, shape, unknown, case.image)
    if promised:
        decided = {name: least for name, least in p.settings.thresholds.items() if name in state.promises.lines}
        verdict = without_thresholds(verdict, learned or agreement, decided)
    unlike = [p.cases.unlike[case.id]] if case.id in p.cases.unlike else []
    return CaseAssessment(agreement, verdict.against(*state.floors.blocking, *unlike), learned), mask


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
    certain = {}
    if p.settings.uncertainty_weight < 1:
        levels = np.rint(255 * case.grid.to_native(confidence(state.masks(case))))
        certain["confidence"] = p.masks.add(levels, case.grid.affine)
    return (
        certain
        | about_mask(state, case.id)
        | {
            "disagreement": p.masks.add(case.grid.to_native(disagreement.astype(np.float32)) >= 0.5, case.grid.affine),
            "source": state.source,
            "threshold": thresholds,
            "models": state.models.hashes,
            "basis": p.basis,
            **({"unknown": list(state.floors.unknown)} if state.floors.unknown else {}),
        }
    )


def about_mask(state: RoundState, case: str) -> dict[str, Any]:
    """Keep the mask of a case; returns its hash, that of the scan, and how far the networks agree by label."""
    p = state.pipeline
    prepared = next(c for c in p.cases.unlabelled if c.id == case)
    found = state.assessments[case]
    # of the labels that it teaches, as they are compared where others are left open
    agreement = {**found.agreement.per_label, **found.of_learned.per_label}
    return {"sha256": keep_mask(p, prepared, state.masks), "image": prepared.image_hash, "agreement": agreement}


def _without_vetoes(pipeline: RoundPipeline, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A recipe that asks for no verdict promotes nothing that was rolled back either."""
    vetoes = mask_vetoes(pipeline.ledger)
    refused = {c for c, d in wanted.items() if c in vetoes and _is_vetoed(pipeline, d["sha256"], vetoes[c])}
    return {case: details for case, details in wanted.items() if case not in refused}


def _is_vetoed(pipeline: RoundPipeline, digest: str, vetoed: set[str]) -> bool:
    """Whether a kept mask is one of the vetoed ones, or nearly the same, as each training draws a little otherwise."""
    if digest in vetoed:
        return True
    mask, *others = (
        read_image(path).array.astype(np.uint8)
        for path in map(pipeline.masks.path, (digest, *sorted(vetoed)))
        if path.exists()
    )
    return any(_same(mask, other, pipeline.labels) for other in others)


def _same(a: np.ndarray, b: np.ndarray, labels: Labels) -> bool:
    if a.shape != b.shape or max(a.max(), b.max()) > len(labels.names):
        return False  # of another scan, or of the time when there were more labels
    return all(value is None or value >= SAME_MASK for value in compare(a, b, labels).per_label.values())


def promote(pipeline: RoundPipeline, wanted: dict[str, dict[str, Any]]) -> list[Promoted]:
    """Promote masks, in the ledger first and then as label files.

    Promotions that this round has withdrawn already, before it was killed, are not recorded a second time.

    Args:
        pipeline: The round's cases and steps.
        wanted: Case id to its :func:`promotion_details`.

    Returns:
        The promoted cases, without those that a human has labelled, or whose scan has changed, meanwhile.
    """
    cases = {c.id: c for c in pipeline.cases.unlabelled}
    late = late_changes(pipeline, wanted)
    if not _withdrawn(pipeline, {c: d["sha256"] for c, d in wanted.items() if c not in late}):
        record(pipeline, PSEUDO, wanted)
    promoted = [pipeline.promoted(cases[n], d) for n, d in sorted(wanted.items()) if n not in late]
    return without_late(pipeline, promoted)


def without_late(pipeline: RoundPipeline, promoted: list[Promoted]) -> list[Promoted]:
    """The promoted cases without those that can no longer be used; these leave the ledger and the label files too."""
    late = drop_late(pipeline, PSEUDO, [p.case.id for p in promoted])
    return [p for p in promoted if p.case.id not in late]


def settle_promotions(
    pipeline: RoundPipeline,
    wanted: dict[str, dict[str, Any]],
    learned: dict[str, str],
    rejected: bool,
    barred: Mapping[str, Sequence[str]],
) -> None:
    """Withdraw the promotions of a round whose retrained model is not the one that is published.

    Args:
        pipeline: The round.
        wanted: What was promoted.
        learned: Case to the hash of the mask that the retrained model learned from.
        rejected: Whether that model is not published.
        barred: Cases whose earlier promotion does not stand again either, and why.
    """
    withdrawn = _withdrawn(pipeline, learned)
    if withdrawn and not rejected:
        record(pipeline, PSEUDO, {case: wanted[case] for case in learned})
    if withdrawn or not rejected:
        return
    ledger, studies, number = _round(pipeline)
    known = {c.id: c.image_hash for c in pipeline.cases.unlabelled}
    now, before = ledger.masks(PSEUDO), ledger.masks(PSEUDO, before=pipeline.opened)
    late = {c: NOT_USED for c in now if c not in known} | {c: "; ".join(why) for c, why in barred.items() if c in known}
    late |= {c: REPLACED for c, e in before.items() if e.details.get("image") != known.get(c) and c in known}
    late |= late_changes(pipeline, now.keys() & known.keys())
    withdraw(ledger, studies, pipeline.paths, number, learned, late)


def _withdrawn(pipeline: RoundPipeline, promoted: dict[str, str]) -> bool:
    """Whether this round has withdrawn these masks already."""
    events = pipeline.ledger.events(kinds=("withdrawn",), number=pipeline.number) if pipeline.number else []
    return bool(events) and events[-1].details["cases"] == promoted


def record(pipeline: RoundPipeline, tag: str, wanted: dict[str, dict[str, Any]]) -> None:
    """Append to the ledger what changes for a tag, then bring the label files in line.

    Args:
        pipeline: The round.
        tag: ``original`` or ``aslseg_pseudo``.
        wanted: Case id to details with ``sha256``.

    Raises:
        LedgerError: This is no round, or it has no studies folder.
    """
    ledger, studies, number = _round(pipeline)
    late = late_changes(pipeline, wanted)
    ledger.append(plan_label_changes(ledger, studies, tag, number, wanted, late))
    # somebody may have saved a label since
    drop_late(pipeline, tag, wanted)
    sync_label_files(ledger, studies, pipeline.paths)


def _round(pipeline: RoundPipeline) -> tuple[Ledger, Studies, int]:
    if pipeline.paths.studies is None or pipeline.number is None:
        raise LedgerError("label files are recorded by a round on a studies folder; run one with --studies DIR")
    return pipeline.ledger, read_studies(pipeline.paths.studies), pipeline.number


def keep_mask(pipeline: RoundPipeline, case: Prepared, masks: CachedProbabilities) -> str:
    """Keep a case's mask on its scan's own grid; returns the SHA-256 of its file."""
    return pipeline.masks.add(case.grid.regions_to_native(masks(case), pipeline.labels), case.grid.affine)


def write_originals(
    state: RoundState, published: ModelSet, report: ProgressCallback
) -> tuple[str, CachedProbabilities]:
    """Write the best current mask of every scan without a human label to ``labels/original``, ledger first.

    Args:
        state: The round.
        published: The models that are published now.
        report: Called with (done, total).

    Returns:
        Whose masks these are, the round's source or ``published ssl`` where that validates better, and their maps.
    """
    p = state.pipeline
    shown, masks = _best_masks(state, published)
    cases = p.cases.without_label
    p.fill(masks, cases, report)
    promoted = {c for c, e in p.ledger.masks(PSEUDO).items() if e.kind == "mask"}
    wanted = {}
    for done, case in enumerate(cases, 1):
        agreement, notes = state.assessments[case.id].agreement, masks.output(case).notes
        wanted[case.id] = {
            "sha256": keep_mask(p, case, masks),
            "image": case.image_hash,
            "source": shown,
            "params": {"label_names": p.labels.values},
            "agreement": agreement.mean,
            "per_label": agreement.per_label,
            "promoted": case.id in promoted,
            "models": published.hashes,
        } | ({"notes": list(notes)} if notes else {})
        report(done, len(cases))
    record(p, ORIGINAL, wanted)
    return shown, masks


def _best_masks(state: RoundState, published: ModelSet) -> tuple[str, CachedProbabilities]:
    """Whose masks clients see: the round's source, or the published SSL model where it validates better."""
    p = state.pipeline
    model = p.predict(ModelKind.SSL, published, noted=True)
    ours, theirs = p.dice(state.masks), p.dice(model) if published.spacing == p.cases.spacing else None
    if ours is not None and theirs is not None and theirs > ours:
        return "published ssl", model
    return state.source, state.masks
