"""Cross-fitting: SSL models that have not seen some labelled patients say how good the SSL stage is on these.

Every human label is scored once, by a model that has learned nothing of its patient; a mean over all of them is
steadier than over one or two validation cases. The models of the folds together with the one that has seen all labels
are an ensemble, one more source of masks for the unlabelled scans.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.prepared_case import Prepared
from aslseg.cases.split import hash_fraction
from aslseg.compute.overlap import dice
from aslseg.errors import TrainingDivergedError
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.fold_share import fold_share
from aslseg.rounds.steps.artefacts import CachedProbabilities
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fold:
    """A part of the labelled cases, and a model that has seen nothing of its patients.

    Attributes:
        cases: The part.
        model: Its SSL model's file.
        maps: Region probabilities of this model.
        limits: On components (:mod:`aslseg.rounds.folds.component_limits`), from the other folds; they are in the
            model's file.
    """

    cases: list[Prepared]
    model: Path
    maps: CachedProbabilities
    limits: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CrossFit:
    """What the folds give.

    Attributes:
        folds: One for each part whose training succeeded.
        dice: By label, with all that is nested in it: mean over the labelled cases; None where no case holds it.
        cases: The same by case id.
        limits: On components, from all folds: for models that have learned all labels.
    """

    folds: list[Fold]
    dice: dict[str, float | None]
    cases: dict[str, dict[str, float | None]]
    limits: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def scored(cls, pipeline: RoundPipeline, folds: list[Fold], limits: Mapping[str, Any] | None = None) -> CrossFit:
        """With the Dice of each fold's model on its cases."""
        cases = {c.id: region_dice(pipeline, fold.maps, c) for fold in folds for c in fold.cases}
        mean = {name: _mean([dice[name] for dice in cases.values()]) for name in pipeline.labels.names}
        logger.info("out-of-fold Dice of the SSL stage on %d cases, %d folds: %s", len(cases), len(folds), mean)
        return cls(folds, mean, dict(sorted(cases.items())), limits or {})

    @property
    def maps(self) -> list[CachedProbabilities]:
        """Region probabilities of each fold's model."""
        return [fold.maps for fold in self.folds]

    @property
    def learned(self) -> list[Fold]:
        """Every other fold, from the second: SAM and the adaptation network learn to correct the masks of these."""
        return self.folds[1::2]

    def learns(self, fold: Fold) -> bool:
        """Whether a fold is one of :attr:`learned`."""
        return any(fold is one for one in self.learned)

    @property
    def parts(self) -> list[list[str]]:
        """Ids of the labelled cases of each fold."""
        return [[case.id for case in fold.cases] for fold in self.folds]

    def summary(self) -> dict[str, Any]:
        """For the summary of a round."""
        return {"out_of_fold": {"folds": len(self.folds), "dice": self.dice, "cases": self.cases}}


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

    Several are trained at a time (:func:`aslseg.ssl.side_by_side.places`).

    Promoted masks come from models that have seen all labels, so that a fold's model must not learn from them. A
    fold whose training fails is left out with a warning; its labels are scored by nobody.

    Returns:
        None where the setting ``label_folds`` or the number of labelled patients gives no two folds.
    """
    parts = folds(pipeline.cases.train, pipeline.settings.most_folds)
    if not parts:
        return None
    ids = [[c.id for c in part] for part in parts]
    found: list[Fold] = []
    for part, left_out, model in zip(
        parts, ids, pipeline.train_folds(ids, report, fold_share(len(parts))), strict=True
    ):
        if isinstance(model, TrainingDivergedError):
            pipeline.cases.warnings.append(
                f"no model without {', '.join(left_out)} ({model}): their labels score nothing"
            )
        else:
            found.append(Fold(part, model, pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: model}))))
    return CrossFit.scored(pipeline, found) if found else None


def share(report: ProgressCallback, number: int, parts: int) -> ProgressCallback:
    """The report of one of several trainings of equal length."""
    return lambda done, total, **shown: report(number * total + done, parts * total, **shown)


def region_dice(pipeline: RoundPipeline, maps: CachedProbabilities, case: Prepared) -> dict[str, float | None]:
    """Dice of each label, with all that is nested in it, with the human label; None where both are empty."""
    predicted = pipeline.labels.regions(pipeline.decode(maps(case)))
    true = pipeline.labels.regions(np.asarray(case.label))
    return {n: dice(a, b) for n, a, b in zip(pipeline.labels.names, predicted, true, strict=True)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
