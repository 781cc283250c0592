"""Components of a nested label that are too small or too unsure to be lesions, and the limits that say so.

The limits are fitted on labelled scans that the network has not learned: on scans that it has, nearly all that it
finds is right. Where a round has no such scans, it uses :data:`USUAL`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from aslseg.compute.weights import load_weights, save_weights
from aslseg.files import sha256
from aslseg.types import Labels

NEIGHBOURHOOD = np.ones((3, 3, 3), bool)
PROBABILITIES = (0.0, 0.6, 0.7, 0.8, 0.9, 0.95)
VOLUMES_MM3 = (0.0, 10.0, 30.0, 100.0, 300.0)
# one patient's lesions say nothing of another's
LEAST_PATIENTS = 2
# part of the lesions found without limits that limits must leave
LEAST_KEPT = 0.5


@dataclass(frozen=True)
class Limits:
    """Least that a component must reach to be kept.

    Attributes:
        probability: Largest region probability in it, 0..1.
        mm3: Its volume.
    """

    probability: float
    mm3: float


USUAL = Limits(0.8, 0.0)
"""Chosen on one split of LiTS: eight to nine of ten false lesions go, and one in five true ones (docs/nested.md)."""


@dataclass(frozen=True)
class Scan:
    """The components of a label in a scan, against the truth.

    Attributes:
        patient: Whose scan it is.
        peaks: Largest probability of each component.
        mm3: Volume of each.
        voxels, right: Voxels of each, and those of them that are true.
        touched: Numbers of the true lesions that each touches.
        truth: Voxels of the truth.
        lesions: Number of its components.
    """

    patient: str
    peaks: np.ndarray
    mm3: np.ndarray
    voxels: np.ndarray
    right: np.ndarray
    touched: tuple[frozenset[int], ...]
    truth: int
    lesions: int

    @classmethod
    def of(cls, patient: str, p: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> Scan:
        """Measured on a prediction.

        Args:
            patient: Whose scan it is.
            p: Region probability of the label, (i, j, k).
            truth: (i, j, k) bool.
            spacing: Voxel size in mm.
        """
        numbers, count = ndimage.label(p >= 0.5, NEIGHBOURHOOD)
        true, lesions = ndimage.label(truth, NEIGHBOURHOOD)
        voxels = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
        right = np.bincount(numbers[truth], minlength=count + 1)[1:]
        touched = []
        for n, where in enumerate(ndimage.find_objects(numbers), 1):
            touched.append(frozenset(int(t) for t in np.unique(true[where][numbers[where] == n])) - {0})
        peaks = _peaks(p, numbers, count)
        return cls(
            patient, peaks, voxels * math.prod(spacing), voxels, right, tuple(touched), int(truth.sum()), int(lesions)
        )

    def kept(self, limits: Limits) -> np.ndarray:
        """Which components reach the limits, bool."""
        return np.asarray((self.peaks >= limits.probability) & (self.mm3 >= limits.mm3))

    def found(self, limits: Limits) -> int:
        """The number of true lesions that a kept component touches."""
        return len(frozenset().union(*(t for t, k in zip(self.touched, self.kept(limits), strict=True) if k)))

    def score(self, limits: Limits) -> float:
        """Mean of Dice and of the lesions' F1 when only what reaches the limits is kept.

        Without a lesion in the truth 1 if nothing is kept, else 0.
        """
        kept = self.kept(limits)
        if not self.truth:
            return float(not kept.any())
        dice = 2 * int(self.right[kept].sum()) / (int(self.voxels[kept].sum()) + self.truth)
        false = int((kept & (self.right == 0)).sum())
        precision = 1 - false / int(kept.sum()) if kept.any() else 0.0
        recall = self.found(limits) / self.lesions
        f1 = 2 * precision * recall / (precision + recall) if precision and recall else 0.0
        return (dice + f1) / 2


def fit(scans: Sequence[Scan]) -> Limits | None:
    """The limits with the best mean :meth:`Scan.score` of those that keep enough; of equal ones the lowest.

    Where most scans hold no lesion, the best score is that of limits that nothing reaches. So at least LEAST_PATIENTS
    patients must keep a component that is right, and LEAST_KEPT of the lesions that are found without limits must
    still be found.

    Args:
        scans: Of labelled scans that the network has not learned.

    Returns:
        None where fewer than LEAST_PATIENTS patients have a lesion that is found: then nothing says what to keep.
    """
    pairs = [Limits(p, mm3) for p, mm3 in product(PROBABILITIES, VOLUMES_MM3)]
    admitted = [pair for pair in pairs if _keeps_enough(scans, pair)]
    if not admitted:
        return None
    # rounded, so that equal means of other order are equal
    return max(admitted, key=lambda pair: round(float(np.mean([s.score(pair) for s in scans])), 6))


def _keeps_enough(scans: Sequence[Scan], pair: Limits) -> bool:
    patients = {s.patient for s in scans if s.right[s.kept(pair)].any()}
    found, without = (sum(s.found(limits) for s in scans) for limits in (pair, Limits(0.0, 0.0)))
    return len(patients) >= LEAST_PATIENTS and found >= LEAST_KEPT * without


def stored(limits: Mapping[str, Limits]) -> dict[str, Any]:
    """Limits by label for a model file."""
    return {name: asdict(pair) for name, pair in limits.items()}


def write_limited(model: Path, out: Path, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Write a model file again with limits.

    Args:
        model: File of an SSL model of two stages.
        out: File to write.
        limits: As :func:`stored` makes them.

    Returns:
        ``sha256`` of the new file and its ``limits``.
    """
    state, metadata = load_weights(model, "ssl")
    save_weights(out, state, metadata | {"specks": dict(limits)})
    return {"sha256": sha256(out), "limits": dict(limits)}


def clear(p: np.ndarray, labels: Labels, limits: Mapping[str, Any], spacing: Sequence[float]) -> int:
    """Give components below the limits to the label in which they lie, in place.

    Args:
        p: Class probabilities (1 + N, i, j, k).
        labels: The N labels.
        limits: By label as :func:`stored` makes them.
        spacing: Voxel size in mm.

    Returns:
        How many components were taken away.
    """
    gone = 0
    for n, (name, parent) in enumerate(zip(labels.names, labels.parents, strict=True)):
        if name not in limits or parent is None:
            continue
        pair, region = Limits(**limits[name]), labels.region_probabilities(p)[n]
        numbers, count = ndimage.label(region >= 0.5, NEIGHBOURHOOD)
        if not count:
            continue
        sizes = np.bincount(numbers.ravel(), minlength=count + 1)[1:] * math.prod(spacing)
        small = (_peaks(region, numbers, count) < pair.probability) | (sizes < pair.mm3)
        where = np.concatenate([[False], small])[numbers]
        for value in labels.members(n):
            p[parent + 1][where] += p[value][where]
            p[value][where] = 0
        gone += int(small.sum())
    return gone


def _peaks(p: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """Largest probability of each component, (count,)."""
    return np.asarray(ndimage.maximum(p, numbers, np.arange(1, count + 1)), float).reshape(count)
