"""ASLseg's round (arXiv 2312.07969): SSL proposes masks, SAM redraws them, the adapter refines these.

A recipe is a function of the :class:`aslseg.rounds.steps.pipeline.RoundPipeline` that returns the round's summary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from aslseg.agreement.promotion_rules import PromotionLimits, refusals, select
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.component_limits import cross_fitted, limited
from aslseg.rounds.folds.evidence import MIXED, Evidence, cascade_sources, fill_folds, gather, judge_labels, mix_sources
from aslseg.rounds.folds.real_errors import learned_faults
from aslseg.rounds.promotion.canaries import concerning
from aslseg.rounds.promotion.promotion import conclude, promotion_details
from aslseg.rounds.promotion.state import RoundState
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)

KEEP_GAIN = 0.05
"""Mean agreement that a new mask must have above that of the promoted one to replace it."""
PROMOTED_SOURCES = ("ssl", "adapter", "consensus", "sam", "ensemble")
"""Sources of masks that may be promoted, in the order in which they are taken where they are equally good."""


def aslseg(pipeline: RoundPipeline) -> dict[str, Any]:
    """Train the three models, promote the masks on which SSL model and adapter agree best, and retrain with these.

    Returns:
        The summary, as :func:`aslseg.rounds.promotion.promotion.conclude`.
    """
    cases, progress = pipeline.cases, pipeline.progress
    before = pipeline.promoted_before()
    with progress.stage("ssl") as report:
        ssl = pipeline.train_ssl(before, report)
    crossed = cross_fitted(pipeline)
    ssl = limited(pipeline, crossed, ssl)
    with progress.stage("predict") as report:
        ssl_maps = pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: ssl}), noted=True)
        pipeline.fill(ssl_maps, cases.predicted, report)
    with progress.stage("sam") as report:
        faults = learned_faults(pipeline, crossed, report)
        sam = pipeline.train_sam(report, faults)
    with progress.stage("redraw") as report:
        sam_maps = pipeline.predict(ModelKind.SAM, ModelSet({ModelKind.SSL: ssl, ModelKind.SAM: sam}), noted=True)
        pipeline.fill(sam_maps, cases.predicted, report)
    with progress.stage("adapter") as report:
        adapter = pipeline.train_adapter(sam, report, faults)
    models = ModelSet({ModelKind.SSL: ssl, ModelKind.SAM: sam, ModelKind.ADAPTER: adapter})
    with progress.stage("refine") as report:
        refined_maps = pipeline.fill(pipeline.predict(ModelKind.ADAPTER, models, noted=True), cases.predicted, report)
    sources = cascade_sources(pipeline, models)
    if crossed:
        sources["ensemble"] = pipeline.ensemble([ssl_maps, *crossed.maps])
        with progress.stage("score") as report:
            fill_folds(pipeline, crossed, models, report)
    evidence = gather(pipeline, crossed, models, sources)
    candidates = [name for name in PROMOTED_SOURCES if name in sources]
    dice = {name: pipeline.dice(sources[name]) for name in candidates}
    chosen = choose_sources(evidence, candidates, pipeline.labels.names)
    source = next(iter(chosen.values()))
    if len({*chosen.values()}) > 1:
        sources[MIXED], evidence = mix_sources(pipeline, evidence, crossed, models, sources, chosen)
        dice[MIXED] = pipeline.dice(sources[MIXED])
        source, whole = MIXED, choose_source(evidence, candidates)
        if not no_worse(evidence, whole):
            source, chosen = whole, dict.fromkeys(chosen, whole)
    floors = judge_labels(evidence, source, pipeline.settings.floors, pipeline.labels)
    state = RoundState(
        pipeline, models, ssl_maps, refined_maps, source, sources[source], evidence, floors, crossed=crossed
    )
    compared = {"cross_fitted": evidence.compared([*candidates, *({MIXED} & sources.keys())]), "sources": chosen}
    compared["severities"] = dict(zip(pipeline.labels.names, faults.most, strict=False))
    return conclude(state, dice, promotable) | compared | (crossed.summary() if crossed else {})


def choose_sources(evidence: Evidence, candidates: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Choose whose masks are promoted for each label: the best on its human labels, as :func:`choose_source`.

    A label that no such human label holds is taken from the source that is best on all others.

    Args:
        evidence: Of the round.
        candidates: Names of the sources, ``ssl`` first.
        names: Of the labels.

    Returns:
        Label to source.
    """
    whole = choose_source(evidence, candidates)
    known = {name for name, values in evidence.by_label("ssl").items() if values} if len(names) > 1 else ()
    return {name: choose_source(evidence.of_label(name), candidates) if name in known else whole for name in names}


def choose_source(evidence: Evidence, candidates: Sequence[str]) -> str:
    """Choose whose masks are promoted: those that are best on human labels that their network was not trained on.

    The adapter helps a weak SSL model and can hurt a strong one, and so do the folds' models in an ensemble. Without
    such labels, or where they are equal, the first is taken.

    Args:
        evidence: Of the round.
        candidates: Names of the sources, ``ssl`` first.
    """
    dice = evidence.compared(candidates)
    source = max(candidates, key=lambda name: -1.0 if dice[name] is None else dice[name])  # type: ignore[arg-type, return-value]
    logger.info(
        "masks of %s are taken from %s (Dice on human labels that were not trained on: %s)",
        ", ".join(evidence.names),
        source,
        dice,
    )
    return source


def no_worse(evidence: Evidence, whole: str) -> bool:
    """Whether the mix of sources is compared with the best whole source on every label, and worse on none.

    Each label is chosen by itself, but labels that lie in another shape each other in the mix. A label that no human
    label holds compares nothing, and is left out.

    Args:
        evidence: With the Dice of the mix.
        whole: The best source.
    """
    for name in evidence.names:
        one = evidence.of_label(name)
        if not any(one.by_label("ssl").values()):
            continue
        theirs, ours = one.compared([whole, MIXED]).values()
        # means of the same numbers in another order may differ in the last bit
        if theirs is None or ours is None or ours < theirs - 1e-9:
            logger.info("%s: the mix of sources (Dice %s) is not kept beside %s (%s)", name, ours, whole, theirs)
            return False
    return True


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
    agreements = {c: state.assessments[c].of_learned for c in cases}
    limits = PromotionLimits(s.promote_fraction, s.promote_cases, s.promote_empty)
    unknown = state.floors.unknown
    kept = {c: old for c, old in p.still_promoted().items() if tuple(old.get("unknown", ())) == unknown}
    names = select(verdicts, agreements, limits, kept)
    state.refused = refusals(verdicts, agreements, limits, names)
    stay = {
        c: old
        for c, old in kept.items()
        if agreements[c].mean - mean_agreement(old) < KEEP_GAIN and not stopped_before(state, old)
    }
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
            wanted[name] = promotion_details(state, cases[name], state.differs(cases[name]), asked)
        report(done, len(names))
    return wanted


def stopped_before(state: RoundState, details: dict[str, Any]) -> bool:
    """Whether a canary of this round speaks against a mask that was promoted before; the verdict is on the new one."""
    if not state.stops:
        return False
    p = state.pipeline
    mask = p.labels.merge(p.kept(details["sha256"]).astype(np.uint8), state.floors.unknown)
    return bool(concerning(mask, p.labels, state.stops))


def mean_agreement(details: dict[str, Any]) -> float:
    """Mean over the labels that it teaches of the agreement with which a mask was promoted."""
    taught = {name: value for name, value in details["agreement"].items() if name not in details.get("unknown", ())}
    known = [value for value in taught.values() if value is not None]
    return sum(known) / len(known) if known else 0.0
