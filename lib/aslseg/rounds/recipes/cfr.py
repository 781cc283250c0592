"""CFR as a round: SAM fine-tuned on stitched slices labels every scan, and the SSL model learns from all of these.

"Stitching, Fine-tuning, Re-training" (arXiv 2403.11229). The SSL method is the setting's; CFR's own is
``mean_teacher`` with ``sam_train = lora`` and ``promote_weight = 1``. As in the paper, every pseudo-label is used or,
if they miss ``promote_floor`` on the validation cases, none; only alien scans, and masks that a canary stops, are
never used. The publishing gate keeps a model that bad ones have made
worse from being published. Scans are ranked by how far both models disagree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.evidence import judge_labels, validated
from aslseg.rounds.promotion.promotion import conclude, promotion_details
from aslseg.rounds.promotion.state import RoundState
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.types import ProgressCallback


def cfr(pipeline: RoundPipeline) -> dict[str, Any]:
    """Label the unlabelled scans with SAM on stitched canvases, and retrain the SSL model with all of these labels.

    Returns:
        The summary, as :func:`aslseg.rounds.promotion.promotion.conclude`.
    """
    cases, progress = pipeline.cases, pipeline.progress
    with progress.stage("ssl") as report:
        ssl = pipeline.train_ssl([], report)
    with progress.stage("predict") as report:
        ssl_maps = pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: ssl}), noted=True)
        pipeline.fill(ssl_maps, cases.predicted, report)
    with progress.stage("sam") as report:
        canvas = pipeline.train_canvas(report)
    models = ModelSet({ModelKind.SSL: ssl, ModelKind.CANVAS: canvas})
    with progress.stage("redraw") as report:
        canvas_maps = pipeline.fill(pipeline.predict(ModelKind.CANVAS, models, noted=True), cases.predicted, report)
    sources = {"ssl": ssl_maps, "canvas": canvas_maps}
    dice = {name: pipeline.dice(maps) for name, maps in sources.items()}
    evidence = validated(pipeline, "canvas", sources)
    floors = judge_labels(evidence, "canvas", pipeline.settings.floors, pipeline.labels)
    state = RoundState(pipeline, models, ssl_maps, canvas_maps, "canvas", canvas_maps, evidence, floors)
    return conclude(state, dice, promote_all, kinds=(ModelKind.SSL,))


def promote_all(state: RoundState, report: ProgressCallback) -> dict[str, dict[str, Any]]:
    """Keep the masks of all unlabelled scans, with the full weight everywhere; none where a label misses its floor.

    Scans that are unlike every labelled one are refused, and so are masks that a canary stops.

    Returns:
        Case id to what the ledger says of its promotion.
    """
    p, wanted = state.pipeline, {}
    state.refused = {c.id: list(why) for c in p.cases.unlabelled if (why := state.against_every_mask(c.id))}
    cases = [c for c in p.cases.unlabelled if c.id not in state.refused]
    for done, case in enumerate(cases, 1):
        nowhere = np.zeros(case.image.shape, bool)
        wanted[case.id] = promotion_details(state, case, nowhere, dict.fromkeys(p.labels.names, 0.0))
        report(done, len(cases))
    return wanted
