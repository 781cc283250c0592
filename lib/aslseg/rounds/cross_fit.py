"""Cross-fitting: SSL models that have not seen some labelled patients say how good the SSL stage is on these.

Every human label is scored once, by a model that has learned nothing of its patient; a mean over all of them is
steadier than over one or two validation cases. The models of the folds together with the one that has seen all labels
are an ensemble, one more source of masks for the unlabelled scans.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aslseg.cases.prepared_case import Prepared
from aslseg.cases.split import hash_fraction
from aslseg.compute.overlap import dice
from aslseg.errors import TrainingDivergedError
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CrossFit:
    """What the folds give.

    Attributes:
        dice: By label, with all that is nested in it: mean over the labelled cases; None where no case holds it.
        cases: The same by case id.
        maps: Region probabilities of each fold's model.
    """

    dice: dict[str, float | None]
    cases: dict[str, dict[str, float | None]]
    maps: list[CachedProbabilities]

    def summary(self) -> dict[str, Any]:
        """For the summary of a round."""
        return {"out_of_fold": {"folds": len(self.maps), "dice": self.dice, "cases": self.cases}}


def folds(cases: Sequence[Prepared], count: int) -> list[list[Prepared]]:
    """Labelled cases in parts of whole patients, of as equal a number of patients as can be.

    Args:
        cases: Labelled cases.
        count: At most so many parts, and no more than there are patients; fewer than two give none.
    """
    patients = sorted({c.patient for c in cases}, key=lambda p: (hash_fraction(p), p))
    count = min(count, len(patients))
    parts = [set(patients[n::count]) for n in range(count)] if count > 1 else []
    return [[c for c in cases if c.patient in part] for part in parts]


def cross_fit(pipeline: RoundPipeline, report: ProgressCallback) -> CrossFit | None:
    """Train a model on the complement of each fold, without promoted masks, and score it on the fold.

    Promoted masks come from models that have seen all labels, so that a fold's model must not learn from them. A fold
    whose training diverges is left out, with a warning: it says nothing about the models that are published.

    Returns:
        None where the setting ``label_folds`` or the number of labelled patients gives no two folds, or all diverge.
    """
    parts = folds(pipeline.cases.train, pipeline.settings.label_folds)
    maps: list[CachedProbabilities] = []
    scored: dict[str, dict[str, float | None]] = {}
    for number, part in enumerate(parts):
        try:
            model = pipeline.train_ssl([], _share(report, number, len(parts)), without=[c.id for c in part])
        except TrainingDivergedError as error:
            line = f"the training without {', '.join(c.id for c in part)} is left out of cross-fitting: {error}"
            logger.warning("%s", line)
            pipeline.cases.warnings.append(line)
            continue
        maps.append(pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: model})))
        scored |= {c.id: _dice(pipeline, maps[-1], c) for c in part}
    if not maps:
        return None
    mean = {name: _mean([d[name] for d in scored.values()]) for name in pipeline.labels.names}
    logger.info("out-of-fold Dice of the SSL stage on %d labelled cases, %d folds: %s", len(scored), len(maps), mean)
    return CrossFit(mean, dict(sorted(scored.items())), maps)


def _share(report: ProgressCallback, number: int, parts: int) -> ProgressCallback:
    """The report of one of several trainings of equal length."""
    return lambda done, total, **shown: report(number * total + done, parts * total, **shown)


def _dice(pipeline: RoundPipeline, maps: CachedProbabilities, case: Prepared) -> dict[str, float | None]:
    predicted = pipeline.labels.regions(pipeline.decode(maps(case)))
    true = pipeline.labels.regions(np.asarray(case.label))
    return {n: dice(a, b) for n, a, b in zip(pipeline.labels.names, predicted, true, strict=True)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
