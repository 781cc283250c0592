"""Masks with errors for training: those that folds really made, and synthetic ones that are as severe as these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aslseg.adaptation.severity import Truth, calibrate
from aslseg.adaptation.synthetic import corrupt, draw_severity, soften
from aslseg.cases.prepared_case import Prepared
from aslseg.types import Labels, ProgressCallback, no_progress

MILD_FRACTION, MILD = 0.4, 0.3
"""Share of the synthetic errors that are nearly none, so that good masks are left alone, and their largest severity."""
REAL_FRACTION = 0.5
"""Share of real masks where there is one."""


@dataclass(frozen=True)
class Faults:
    """Draws masks of labelled cases with errors.

    Attributes:
        labels: Names and nesting.
        most: Largest severity of the synthetic errors by label (:func:`fit_severities`); empty: 1.
        real: Region probabilities (R, i, j, k) of a case by a network that was not trained on it, by case id.
        key: What a training that uses these depends on; empty where they are all synthetic and not calibrated.
    """

    labels: Labels
    most: tuple[float, ...] = ()
    real: Mapping[str, Callable[[Prepared], np.ndarray]] = field(default_factory=dict)
    key: Mapping[str, Any] = field(default_factory=dict)

    def corrupt(
        self,
        regions: np.ndarray,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        rng: np.random.Generator,
    ) -> np.ndarray:
        """True regions with synthetic errors, (R, i, j, k) bool; see :func:`aslseg.adaptation.synthetic.corrupt`."""
        most = np.array(self.most or [1.0] * len(self.labels))
        mild = rng.random() < MILD_FRACTION
        severity = rng.uniform(0, MILD) * np.minimum(most, 1) if mild else draw_severity(rng) * most
        return corrupt(regions, image, self.labels, spacing, rng, severity)

    def __call__(self, case: Prepared, rng: np.random.Generator) -> np.ndarray:
        """Region probabilities (R, i, j, k) float32 of a labelled case with errors, real or as an SSL model's."""
        if case.id in self.real and rng.random() < REAL_FRACTION:
            return self.real[case.id](case)
        image, spacing = np.asarray(case.image, np.float32), case.grid.spacing
        faulty = self.corrupt(self.labels.regions(np.asarray(case.label)), image, spacing, rng)
        return np.stack([soften(mask, spacing, rng) for mask in faulty])


def fit_severities(
    cases: Sequence[Prepared],
    labels: Labels,
    dice: Mapping[str, Mapping[str, float | None]],
    rng: np.random.Generator,
    report: ProgressCallback = no_progress,
) -> tuple[float, ...]:
    """Severities at which synthetic errors have the median Dice of real ones, by label.

    Args:
        cases: Labelled cases.
        labels: Names and nesting.
        dice: Case id to Dice by label of masks by networks that were not trained on the case.
        rng: For :func:`aslseg.adaptation.severity.calibrate`.
        report: Called with (done, labels) after each label.

    Returns:
        For :attr:`Faults.most`; 1 for a label that no such case holds.
    """
    found = []
    for n, name in enumerate(labels.names):
        truths, real = [], []
        for case in cases:
            mask, value = np.isin(np.asarray(case.label), labels.members(n)), dice.get(case.id, {}).get(name)
            if value is not None and mask.any():
                truths.append(Truth.around(mask, np.asarray(case.image, np.float32), case.grid.spacing))
                real.append(value)
        found.append(calibrate(truths, float(np.median(real)), rng) if truths else 1.0)
        report(len(found), len(labels))
    return tuple(found)
