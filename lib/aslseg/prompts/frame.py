"""The conversion between array indices and SAM's coordinates.

A slice is an array (i, j) with rows i and columns j, the first two axes of a volume (i, j, k) at one k. SAM counts
x along columns and y along rows: **(x, y) = (j, i)**. Only this module swaps the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SlicePrompt:
    """A prompt for one object on one slice, in pixels of the slice.

    Attributes:
        box: (x0, y0, x1, y1), the far side exclusive, may be fractional; None without a box.
        points: (n, 2) as (x, y), float.
        point_labels: (n,), 1 inside the object, 0 outside.
        mask: (i, j) float32 probabilities of the object, 0 elsewhere; None without a mask.
    """

    box: tuple[float, float, float, float] | None
    points: np.ndarray
    point_labels: np.ndarray
    mask: np.ndarray | None = None


def to_xy(pixels: np.ndarray) -> np.ndarray:
    """Pixels (n, 2) as (i, j) to points (n, 2) as (x, y), float64."""
    return np.asarray(pixels, np.float64).reshape(-1, 2)[:, ::-1].copy()


def to_box(rows: tuple[float, float], columns: tuple[float, float]) -> tuple[float, float, float, float]:
    """Half-open ranges of rows i and columns j to a box (x0, y0, x1, y1)."""
    return float(columns[0]), float(rows[0]), float(columns[1]), float(rows[1])


def box_slices(
    box: tuple[float, float, float, float] | None, margin: float, shape: tuple[int, int]
) -> tuple[slice, slice]:
    """Index of the pixels (i, j) in a box, widened by ``margin`` pixels and cut to ``shape``; of all without a box."""
    if box is None:
        return slice(0, shape[0]), slice(0, shape[1])
    x0, y0, x1, y1 = box
    low = np.floor([y0 - margin, x0 - margin]).clip(0, shape).astype(int)
    high = np.ceil([y1 + margin, x1 + margin]).clip(0, shape).astype(int)
    return slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))
