"""ASLseg's round (arXiv 2312.07969): SSL proposes masks, SAM redraws them, the adapter refines these.

A recipe is a function of the :class:`aslseg.rounds.pipeline.RoundPipeline` that returns the round's summary.
"""

from __future__ import annotations

import logging
from typing import Any

from aslseg.agreement.promotion_rules import PromotionLimits, refusals, select
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.cross_fit import cross_fit
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.rounds.promotion import conclude, promotion_details
from aslseg.rounds.state import RoundState
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)

KEEP_GAIN = 0.05
"""Mean agreement that a new mask must have above that of the promoted one to replace it."""


def aslseg(pipeline: RoundPipeline) -> dict[str, Any]:
    """Train the three models, promote the masks on which SSL model and adapter agree best, and retrain with these.

    Returns:
        The summary, as :func:`aslseg.rounds.promotion.conclude`.
    """
    cases, progress = pipeline.cases, pipeline.progress
    before = pipeline.promoted_before()
    with progress.stage("ssl") as report:
        ssl = pipeline.train_ssl(before, report)
    crossed = None
    if pipeline.settings.label_folds:
        with progress.stage("folds") as report:
            crossed = cross_fit(pipeline, report)
    with progress.stage("predict") as report:
        ssl_maps = pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: ssl}))
        pipeline.fill(ssl_maps, cases.predicted, report)
    with progress.stage("sam") as report:
        sam = pipeline.train_sam(report)
    with progress.stage("redraw") as report:
        sam_maps = pipeline.predict(ModelKind.SAM, ModelSet({ModelKind.SSL: ssl, ModelKind.SAM: sam}))
        pipeline.fill(sam_maps, cases.predicted, report)
    with progress.stage("adapter") as report:
        adapter = pipeline.train_adapter(sam, report)
    models = ModelSet({ModelKind.SSL: ssl, ModelKind.SAM: sam, ModelKind.ADAPTER: adapter})
    with progress.stage("refine") as report:
        refined_maps = pipeline.fill(pipeline.predict(ModelKind.ADAPTER, models), cases.predicted, report)
    candidates = {"ssl": ssl_maps, "adapter": refined_maps, "consensus": pipeline.consensus(ssl_maps, refined_maps)}
    if crossed:
        candidates["ensemble"] = pipeline.ensemble([ssl_maps, *crossed.maps])
    source, dice = choose_source(pipeline, candidates)
    state = RoundState(pipeline, models, ssl_maps, refined_maps, source, candidates[source])
    return conclude(state, dice, promotable) | (crossed.summary() if crossed else {})


def choose_source(
    pipeline: RoundPipeline, candidates: dict[str, CachedProbabilities]
) -> tuple[str, dict[str, float | None]]:
    """Choose whose masks are promoted: those that are best on the validation cases.

    The adapter helps a weak SSL model and can hurt a strong one, and so do the folds' models in an ensemble. Without
    validation cases, or where they are equal, the SSL model's are taken.

    Args:
        pipeline: The round's cases.
        candidates: Region probabilities by name, ``ssl`` first.

    Returns:
        The name of the best, and the validation Dice of all.
    """
    dice = {name: pipeline.dice(maps) for name, maps in candidates.items()}
    source = max(candidates, key=lambda name: -1.0 if dice[name] is None else dice[name])  # type: ignore[arg-type, return-value]
    logger.info("masks are taken from %s (validation Dice %s)", source, dice)
    return source, dice


def promotable(state: RoundState, report: ProgressCallback) -> dict[str, dict[str, Any]]:
    """Keep the masks of the scans on which the networks agree best, as many as the promise allows.

    While neither human labels nor settings change, a promoted mask stays as it is until the networks agree clearly
    better on a new one (``KEEP_GAIN``), and promoted scans come before others. Otherwise every round would draw
    slightly other masks, and train, predict and draw again for nothing.

    Returns:
        Case id to what the ledger says of its promotion.
    """
    p, s = state.pipeline, state.pipeline.settings
    cases, wanted = {c.id: c for c in p.cases.unlabelled}, {}
    verdicts = {c: state.assessments[c].verdict for c in cases}
    agreements = {c: state.assessments[c].agreement for c in cases}
    limits = PromotionLimits(s.promote_fraction, s.promote_cases, s.promote_empty)
    kept = p.still_promoted()
    names = select(verdicts, agreements, limits, kept)
    state.refused = refusals(verdicts, agreements, limits, names)
    stay = {c: old for c, old in kept.items() if agreements[c].mean - mean_agreement(old) < KEEP_GAIN}
    masks = [stay[c]["agreement"] if c in stay else agreements[c].per_label for c in names]
    most, promises = state.promises.largest(masks), state.promises
    state.promise = promises.about(masks, most)
    if most < len(names):
        left = {c for c in cases if verdicts[c].promote} - set(names[:most])
        state.refused |= {c: [promises.refusal(most)] for c in left}
    names, asked = names[:most], {name: least for name, least in s.thresholds.items() if name not in promises.lines}
    for done, name in enumerate(names, 1):
        if name in stay:
            wanted[name] = stay[name]
        else:
            case = cases[name]
            differ = p.decode(state.ssl_maps(case)) != p.decode(state.second_maps(case))
            wanted[name] = promotion_details(state, case, differ, asked)
        report(done, len(names))
    return wanted


def mean_agreement(details: dict[str, Any]) -> float:
    """Mean over the labels of the agreement with which a mask was promoted."""
    known = [value for value in details["agreement"].values() if value is not None]
    return sum(known) / len(known) if known else 0.0
