"""Measures between two masks; empty masks are handled and flagged.

The surface of a mask is the mask without its erosion by the 6-neighbourhood; the outside of the array counts as
background, so a mask that touches the border has a surface there. Surface distances run from surface voxel centre to
nearest surface voxel centre. This is medpy's definition, and MONAI's surface distances are the same numbers, so
MONAI computes them here. For HD95 the two differ: MONAI's ``HausdorffDistanceMetric`` takes the larger of the two
directed percentiles; medpy (and the published tables) pools both directions first, as :func:`hd95` does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aslseg.types import Labels

DISTANCES = ("hd", "hd95", "hd95_max", "asd", "assd")


@dataclass(frozen=True)
class Agreement:
    """How well two class maps of one scan agree.

    Attributes:
        per_label: Dice by label name; None where the label is empty in both maps.
        mean: Mean over the labels that are not None; 1 if all are.
        flags: Which label is empty in which map.
    """

    per_label: dict[str, float | None]
    mean: float
    flags: tuple[str, ...] = ()

    @property
    def empty(self) -> tuple[str, ...]:
        """The labels that are empty in both maps: nothing is known of how well the two agree on them."""
        return tuple(name for name, value in self.per_label.items() if value is None)

    def without(self, names: Collection[str]) -> Agreement:
        """The agreement on the other labels."""
        kept = {name: value for name, value in self.per_label.items() if name not in names}
        flags = tuple(flag for flag in self.flags if flag.split(":")[0] not in names)
        return Agreement(kept, _mean(kept), flags)


def compare(a: np.ndarray, b: np.ndarray, labels: Labels) -> Agreement:
    """Dice per label of two class maps (i, j, k) with values 0..N, over the whole volume.

    A label that only one map holds has Dice 0; one that neither holds has none. Both are flagged.

    Raises:
        ValueError: The shapes differ, or values are not among 0..N.
    """
    per_label: dict[str, float | None] = {}
    flags = []
    for name, (both, first, second) in zip(labels.names, _counts(a, b, len(labels)), strict=True):
        per_label[name] = 2 * both / (first + second) if first + second else None
        if not first or not second:
            flags.append(f"{name}: empty in {'the second' if first else 'the first' if second else 'both'}")
    if all(value is None for value in per_label.values()):
        flags.append("all labels are empty in both")
    return Agreement(per_label, _mean(per_label), tuple(flags))


def _mean(per_label: Mapping[str, float | None]) -> float:
    known = [value for value in per_label.values() if value is not None]
    return float(np.mean(known)) if known else 1.0


def surface_distances(a: np.ndarray, b: np.ndarray, spacing: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface voxel of one mask to the surface of the other.

    Args:
        a, b: Masks (i, j, k), neither empty.
        spacing: Voxel size in mm along i, j, k; None measures in voxels.

    Returns:
        From a to b, and from b to a, each a float64 vector.

    Raises:
        ValueError: A mask is empty, or the shapes differ.
    """
    # MONAI imports torch, which Dice alone does not need
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    if a.shape != b.shape:
        raise ValueError(f"expected two masks of one shape, got {a.shape} and {b.shape}")
    if not a.any() or not b.any():
        raise ValueError("expected two masks that are not empty; there is no distance to nothing")
    first, second = get_mask_edges(a.astype(bool), b.astype(bool))
    forth = get_surface_distance(first, second, spacing=spacing)
    back = get_surface_distance(second, first, spacing=spacing)
    return np.asarray(forth, np.float64), np.asarray(back, np.float64)


def hd95(forth: np.ndarray, back: np.ndarray) -> float:
    """95th percentile of the surface distances of both directions pooled (medpy's ``hd95``), linear interpolation."""
    return float(np.percentile(np.concatenate([forth, back]), 95))


def score(
    pred: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None, voxels: int | None = None
) -> dict[str, Any]:
    """All measures of a predicted against a true mask.

    Where both masks are empty, Dice and Jaccard are 1; where one is, 0. Distances are None in both cases, and
    sensitivity is None without truth.

    Args:
        pred, truth: Masks (i, j, k).
        spacing: Voxel size in mm; None measures in voxels.
        voxels: Voxels of the whole scan where the masks are a part of it, for the specificity.

    Returns:
        ``dice``, ``jaccard``, ``sensitivity``, ``specificity``, ``flags``, and the distances ``hd`` (largest of both
        directions), ``hd95`` (pooled), ``hd95_max`` (the larger of the two directed percentiles, as MONAI's
        ``HausdorffDistanceMetric``), ``asd`` (mean distance from the predicted to the true surface, one direction, as
        medpy's ``asd(pred, truth)``) and ``assd`` (mean of both directions' means, as medpy's ``assd``).
    """
    both, predicted, true = _counts(np.asarray(pred, bool), np.asarray(truth, bool), 1)[0]
    outside = (voxels or truth.size) - true
    rates = {
        "sensitivity": both / true if true else None,
        "specificity": (outside - predicted + both) / outside if outside else None,
    }
    if not predicted or not true:
        value = 0.0 if predicted or true else 1.0
        flag = "empty prediction" if true else "empty truth" if predicted else "empty in both"
        return {"dice": value, "jaccard": value, **rates, **dict.fromkeys(DISTANCES), "flags": [flag]}
    forth, back = surface_distances(pred, truth, spacing)
    return {
        "dice": 2 * both / (predicted + true),
        "jaccard": both / (predicted + true - both),
        **rates,
        "hd": float(max(forth.max(), back.max())),
        "hd95": hd95(forth, back),
        "hd95_max": float(max(np.percentile(forth, 95), np.percentile(back, 95))),
        "asd": float(forth.mean()),
        "assd": float((forth.mean() + back.mean()) / 2),
        "flags": [],
    }


def _counts(a: np.ndarray, b: np.ndarray, classes: int) -> list[tuple[int, int, int]]:
    """For each class 1..N: voxels in both, in a, in b; from one confusion matrix."""
    if a.shape != b.shape:
        raise ValueError(f"expected two masks of one shape, got {a.shape} and {b.shape}")
    for array in (a, b):
        if array.size and not (array.min() >= 0 and array.max() <= classes):
            raise ValueError(f"expected class values 0..{classes}, got {array.min()}..{array.max()}")
    n = classes + 1
    pairs = a.astype(np.int64).ravel() * n + b.astype(np.int64).ravel()
    table = np.bincount(pairs, minlength=n * n).reshape(n, n)
    return [(int(table[c, c]), int(table[c].sum()), int(table[:, c].sum())) for c in range(1, n)]
