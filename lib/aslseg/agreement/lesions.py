"""Lesions counted one by one: how many were found, and how many were drawn where there is none.

A lesion is a component of a mask in the 26-neighbourhood. It counts as found as soon as one of its voxels is in the
other mask, the most lenient of the usual rules; the size of the overlap is what Dice is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

NEIGHBOURHOOD = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class LesionCounts:
    """Lesions of one scan.

    Attributes:
        true: Lesions of the truth.
        found: Those of them that the prediction touches.
        predicted: Lesions of the prediction.
        false: Those of them that touch no true lesion.
    """

    true: int
    found: int
    predicted: int
    false: int

    @property
    def recall(self) -> float | None:
        """Found lesions of all true ones; None without any."""
        return self.found / self.true if self.true else None

    @property
    def precision(self) -> float | None:
        """Predicted lesions that are true of all predicted ones; None without any."""
        return (self.predicted - self.false) / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of recall and precision; 0 where one of the masks is empty, None where both are."""
        recall, precision = self.recall, self.precision
        if recall is None and precision is None:
            return None
        if not recall or not precision:
            return 0.0
        return 2 * recall * precision / (recall + precision)


def count_lesions(pred: np.ndarray, truth: np.ndarray) -> LesionCounts:
    """Lesions of a predicted and a true mask.

    Args:
        pred, truth: Masks (i, j, k), bool.

    Raises:
        ValueError: Different shapes.
    """
    if pred.shape != truth.shape:
        raise ValueError(f"expected two masks of one shape, got {pred.shape} and {truth.shape}")
    true, found = _touched(truth, pred)
    predicted, right = _touched(pred, truth)
    return LesionCounts(true, found, predicted, predicted - right)


def _touched(mask: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Components of a mask, and how many of them share a voxel with the other mask."""
    components, count = ndimage.label(mask, NEIGHBOURHOOD)
    return int(count), int(np.count_nonzero(np.unique(components[other.astype(bool)])))
