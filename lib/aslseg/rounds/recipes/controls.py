"""Rounds to compare ASLseg's with: the same labels, the same engine and as many training steps, without SAM and folds.

``supervised`` learns the human labels alone. ``self_training`` learns the SSL model's own masks of all scans, as
pseudo-labels were first used (Lee 2013), or none, if they miss ``promote_floor`` on the validation cases. There is no
second network, so that every scan has the agreement 1 and nothing is ranked.
"""

from __future__ import annotations

from typing import Any

from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.cross_fit import folds
from aslseg.rounds.folds.evidence import judge_labels, validated
from aslseg.rounds.folds.fold_share import fold_share
from aslseg.rounds.promotion.promotion import Choice, conclude
from aslseg.rounds.promotion.state import RoundState
from aslseg.rounds.recipes.cfr import promote_all
from aslseg.rounds.steps.pipeline import RoundPipeline


def supervised(pipeline: RoundPipeline) -> dict[str, Any]:
    """Train on the human labels alone, from random weights, for all steps of an ASLseg round.

    Returns:
        The summary, as :func:`aslseg.rounds.promotion.promotion.conclude`.
    """
    steps = all_steps(pipeline)
    pipeline.settings = pipeline.settings.model_copy(update={"ssl_method": "supervised", "ssl_iterations": steps})
    return _one_network(pipeline, lambda state, report: {})


def self_training(pipeline: RoundPipeline) -> dict[str, Any]:
    """Train the SSL model, then go on with its own masks of all scans for the other steps of an ASLseg round.

    Returns:
        The summary, as :func:`aslseg.rounds.promotion.promotion.conclude`.
    """
    steps = all_steps(pipeline) - pipeline.settings.ssl_iterations
    pipeline.settings = pipeline.settings.model_copy(update={"retrain_iterations": steps})
    return _one_network(pipeline, promote_all)


def all_steps(pipeline: RoundPipeline) -> int:
    """Training steps of all networks in a round of the recipe ``aslseg`` with these labels."""
    s = pipeline.settings
    parts = len(folds(pipeline.cases.train, s.most_folds))
    crossed = round(parts * fold_share(parts) * s.ssl_iterations)
    return s.ssl_iterations + crossed + s.sam_iterations + s.adapter_iterations + s.retrain_iterations


def _one_network(pipeline: RoundPipeline, choose: Choice) -> dict[str, Any]:
    """A round whose only network is the SSL model."""
    with pipeline.progress.stage("ssl") as report:
        ssl = pipeline.train_ssl([], report)
    models = ModelSet({ModelKind.SSL: ssl})
    with pipeline.progress.stage("predict") as report:
        maps = pipeline.fill(pipeline.predict(ModelKind.SSL, models, noted=True), pipeline.cases.predicted, report)
    evidence = validated(pipeline, "ssl", {"ssl": maps})
    floors = judge_labels(evidence, "ssl", pipeline.settings.floors, pipeline.labels)
    state = RoundState(pipeline, models, maps, maps, "ssl", maps, evidence, floors)
    return conclude(state, {"ssl": pipeline.dice(maps)}, choose, kinds=(ModelKind.SSL,))
