"""Whether promoted masks help, on human labels that the models have not seen: the folds' models are retrained too.

The model f_k of fold k has learned nothing of the fold. It goes on as the round's model does, on the promoted cases,
but with masks that f_k itself has drawn on them: the round's masks come from models that have learned the fold's
labels. So the Dice of the retrained model g_k on the fold says what promoting these cases gives. Which cases these are
was chosen by models that know the fold; nothing else of it gets in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from aslseg.cases.prepare import save_array
from aslseg.cases.prepared_case import Prepared
from aslseg.errors import TrainingDivergedError
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.component_limits import limited
from aslseg.rounds.folds.cross_fit import CrossFit, folds
from aslseg.rounds.folds.fold_share import fold_share
from aslseg.rounds.steps.artefacts import CachedProbabilities, confidence
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.rounds.steps.promoted import Promoted
from aslseg.ssl.side_by_side import packed
from aslseg.types import ProgressCallback


def retrained_dice(
    pipeline: RoundPipeline,
    crossed: CrossFit,
    promoted: Collection[str],
    report: ProgressCallback,
    unknown: tuple[str, ...] = (),
) -> dict[str, float]:
    """Mean Dice over the labels of each labelled case, by the retrained model of the fold that it lies in.

    Its components have the limits of that fold, as those of the round's model have the limits from all folds.
    The voxels of the promoted cases weigh as in the round, but for ``disagreement_weight``: there is no adaptation
    network that has not seen the fold.

    Args:
        pipeline: The round.
        crossed: The folds and the predictions of their models f_k.
        promoted: Ids of the promoted cases. None: the folds' models stay as they are.
        report: Called with (step, steps) of all trainings.
        unknown: Nested labels of which the promoted masks say nothing.

    Returns:
        Case to Dice; a case in which neither mask holds anything is left out, and so are, with a warning, those
        of a fold whose training diverges.
    """
    unlabelled = [c for c in pipeline.cases.unlabelled if c.id in promoted]
    found: dict[str, float | None] = {}
    for fold, model in zip(crossed.folds, _retrained(pipeline, crossed, unlabelled, report, unknown), strict=True):
        part, maps = [c.id for c in fold.cases], fold.maps
        if isinstance(model, TrainingDivergedError):
            ids = ", ".join(part)
            pipeline.cases.warnings.append(f"no retrained model without {ids} ({model}): their labels compare nothing")
            continue
        if unlabelled:
            maps = pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: limited(pipeline, fold, model)}))
        found |= {c.id: pipeline.dice(maps, [c]) for c in pipeline.cases.train if c.id in part}
    return {case: value for case, value in sorted(found.items()) if value is not None}


def _retrained(
    pipeline: RoundPipeline,
    crossed: CrossFit,
    promoted: Sequence[Prepared],
    report: ProgressCallback,
    unknown: tuple[str, ...],
) -> list[Path | TrainingDivergedError]:
    """The model of each fold, retrained on promoted cases where there are any."""
    if not promoted:
        return [fold.model for fold in crossed.folds]
    part = fold_share(len(folds(pipeline.cases.train, pipeline.settings.most_folds)))
    total = len(crossed.folds) * len(promoted)
    own: list[list[Promoted]] = []
    for number, fold in enumerate(crossed.folds):
        own.append([])
        for case in promoted:
            own[number].append(own_mask(pipeline, fold.maps, case, unknown))
            report(number * len(promoted) + len(own[number]), total)
    return pipeline.train_folds(crossed.parts, report, part, own)


def own_mask(
    pipeline: RoundPipeline, maps: CachedProbabilities, case: Prepared, unknown: tuple[str, ...] = ()
) -> Promoted:
    """A promoted case with the mask that a fold's model draws on it; its arrays are files, as there may be many."""
    s = pipeline.settings
    inputs = {
        "maps": maps.folder.name,
        "image": case.image_hash,
        "labels": [*s.model_dump(include={"labels", "nested"}).values()],
        "uncertainty_weight": s.uncertainty_weight,
        "unknown": unknown,
    }
    folder = pipeline.artefacts.folder("own_mask", inputs)
    label, weight = (folder / f"{folder.name}.{part}.npy" for part in ("label", "weight"))
    if not (label.exists() and weight.exists()):
        regions = maps(case)
        save_array(weight, (1 - (1 - s.uncertainty_weight) * (1 - confidence(regions))).astype(np.float16))
        save_array(label, pipeline.labels.mark_unknown(pipeline.decode(regions).astype(np.uint8), unknown))
    learned = replace(
        case,
        label=np.load(label, mmap_mode="r"),
        weight=s.promote_weight,
        voxel_weight=np.load(weight, mmap_mode="r"),
    )
    return Promoted(packed(learned), case.image_hash, folder.name, "", unknown=unknown)
