"""CFR as a round: SAM fine-tuned on stitched slices labels every scan, and the SSL model learns from all of it.

"Stitching, Fine-tuning, Re-training" (arXiv 2403.11229, science.md §2). The SSL method is the setting's; CFR's own is
``mean_teacher`` with ``sam_train = lora`` and ``promote_weight = 1``. As there, no pseudo-label is held back: what
stands between a bad one and the annotators is the publishing gate. Where both models disagree is ranked for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from aslseg.files import sha256
from aslseg.models.files import ModelSet
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.gate import publish_better
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.rounds.recipes.aslseg import CaseAssessment, choose_shown, keep_mask, promote, rank, write_originals
from aslseg.types import ProgressCallback


@dataclass(frozen=True)
class CanvasModelSet(ModelSet):
    """An SSL model and a SAM for canvases, which stands in the place of both other models."""

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Kind to SHA-256."""
        return {"ssl": sha256(self.ssl), "canvas": sha256(self.sam)}


def cfr(stages: RoundPipeline, number: int) -> dict[str, Any]:
    """SAM labels the unlabelled scans from stitched canvases; the SSL model is retrained with all of these labels.

    Returns:
        As :func:`aslseg.rounds.recipes.aslseg.aslseg`; ``source`` is ``canvas``.
    """
    team, progress = stages.team, stages.progress
    everyone = [*team.waiting, *team.validation]
    with progress.stage("ssl") as report:
        ssl = stages.train_ssl([], report)
    with progress.stage("predict") as report:
        regions = stages.fill(stages.predict(ssl), everyone, report)
    with progress.stage("sam") as report:
        canvas = stages.train_canvas(report)
    with progress.stage("redraw") as report:
        drawn = stages.fill(stages.draw(canvas), everyone, report)
    models = CanvasModelSet(ssl, canvas, canvas)
    dice = {"ssl": stages.dice(regions), "canvas": stages.dice(drawn)}
    with progress.stage("rank") as report:
        judged = rank(stages, number, models, regions, drawn, drawn, report)
    with progress.stage("promote") as report:
        chosen = promote(stages, number, promote_all(stages, models, drawn, judged, report))
    with progress.stage("retrain") as report:
        retrained = stages.train_ssl(chosen, report)
    promoted = [p.case.id for p in chosen]
    with progress.stage("publish") as report:
        best, lines, gated = publish_better(stages, number, models, retrained, promoted, report, kinds=("ssl",))
    with progress.stage("originals") as report:
        shown, masks = choose_shown(stages, "canvas", drawn, best)
        stages.fill(masks, team.waiting, report)
        write_originals(stages, number, best, shown, masks, judged, report)
    return {
        "validation": dice | gated,
        "source": "canvas",
        "shown": shown,
        "promoted": promoted,
        "agreement": {c: j.agreement.mean for c, j in sorted(judged.items())},
        "published": lines,
        "models": {"ssl": str(ssl), "canvas": str(canvas), "retrained": str(retrained)},
    }


def promote_all(
    stages: RoundPipeline,
    models: CanvasModelSet,
    masks: CachedProbabilities,
    judged: dict[str, CaseAssessment],
    report: ProgressCallback,
) -> dict[str, dict[str, Any]]:
    """Keep the masks of all unlabelled scans, doubted nowhere; case to what the ledger says of its promotion."""
    wanted = {}
    for done, case in enumerate(stages.team.unlabelled, 1):
        nowhere = np.zeros(case.grid.to_native(np.zeros(case.image.shape, np.float32)).shape, bool)
        wanted[case.id] = {
            "sha256": keep_mask(stages, case, masks),
            "disagreement": stages.masks.add(nowhere, case.grid.affine),
            "image": stages.team.content[case.id],
            "source": "canvas",
            "agreement": judged[case.id].agreement.per_label,
            "threshold": dict.fromkeys(stages.labels.names, 0.0),
            "models": models.hashes,
        }
        report(done, len(stages.team.unlabelled))
    return wanted
