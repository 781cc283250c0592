"""SAM looks at small objects twice: at the whole slice, and at a crop of it enlarged to the size of the slice.

The whole slice shows where in the body the object is, the crop shows its details. Both answers are averaged, weighted
by the IoU that SAM predicts for each. Crops have a half or a quarter of the edges of the slice and begin at multiples
of a quarter of their own edge, so that prompts that differ a little share a crop and its embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aslseg.prompts.frame import SlicePrompt, to_box
from aslseg.sam.modeling.build import SAMModel

MAX_ZOOM = 4
STARTS_PER_EDGE = 4  # a crop begins at a multiple of its edge divided by this
ROOM = 1 - 1 / STARTS_PER_EDGE  # of a crop: an object that is not longer lies within the nearest one
IOU_POWER, MIN_IOU = 4, 0.01  # the predicted IoU as a weight


@dataclass(frozen=True)
class Crop:
    """The part of a slice (i, j) that SAM is shown: half-open ranges of rows and columns."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(i, j) of the crop."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def index(self) -> tuple[slice, slice]:
        """For arrays whose last two axes are those of the slice: ``array[..., *crop.index]``."""
        return slice(*self.rows), slice(*self.columns)

    def to_crop(self, prompt: SlicePrompt) -> SlicePrompt:
        """A prompt in pixels of the slice to one in pixels of the crop; points outside the crop are left out."""
        corner = np.array([self.columns[0], self.rows[0]])
        points = prompt.points - corner
        inside = ((points >= -0.5) & (points < np.array(self.shape[::-1]) - 0.5)).all(1)
        box = None
        if prompt.box is not None:
            x0, y0, x1, y1 = np.array(prompt.box) - np.tile(corner, 2)
            box = (float(x0), float(y0), float(x1), float(y1))
        mask = None if prompt.mask is None else np.ascontiguousarray(prompt.mask[self.index])
        return SlicePrompt(box, points[inside], prompt.point_labels[inside], mask)

    def intersect(self, rows: slice, columns: slice) -> Crop:
        """The part of this crop that lies in some rows and columns of the slice."""
        (i0, i1), (j0, j1) = self.rows, self.columns
        return Crop((max(i0, rows.start), min(i1, rows.stop)), (max(j0, columns.start), min(j1, columns.stop)))

    def index_in(self, other: Crop) -> tuple[slice, slice]:
        """As :attr:`index`, for arrays that show another crop, which contains this one."""
        i, j = other.rows[0], other.columns[0]
        return slice(self.rows[0] - i, self.rows[1] - i), slice(self.columns[0] - j, self.columns[1] - j)


def full_crop(shape: tuple[int, int]) -> Crop:
    """The crop that is a whole slice (i, j)."""
    return Crop((0, shape[0]), (0, shape[1]))


def crop_for(prompt: SlicePrompt, shape: tuple[int, int], model: SAMModel, min_tokens: float) -> Crop:
    """The crop around the object of a prompt: enlarged two or four times where it is shorter than ``min_tokens``.

    The object is the box of the prompt, or else its mask, together with all clicks inside the object. A prompt with
    neither box nor mask does not tell the size of its object, and SAM is shown the whole slice.

    Args:
        prompt: In pixels of the slice.
        shape: (i, j) of the slice.
        model: Has the size of a token.
        min_tokens: Setting ``sam_zoom``; 0: nothing is enlarged.
    """
    box = _extent(prompt)
    if box is None or not min_tokens:
        return full_crop(shape)
    x0, y0, x1, y1 = box
    x_scale, y_scale = model.scale(shape)
    tokens = max((x1 - x0) * x_scale, (y1 - y0) * y_scale) / model.architecture.patch_size
    zoom, fraction = 1, max((y1 - y0) / shape[0], (x1 - x0) / shape[1])
    while zoom < MAX_ZOOM and tokens * zoom < min_tokens and 2 * zoom * fraction <= ROOM:
        zoom *= 2
    if zoom == 1:
        return full_crop(shape)
    return crop_around(((y0 + y1) / 2, (x0 + x1) / 2), shape, zoom)


def crop_around(middle: tuple[float, float], shape: tuple[int, int], zoom: int) -> Crop:
    """The crop of ``1 / zoom`` of the edges of a slice (i, j) whose middle is nearest to a place (i, j) on it."""
    return Crop(_aligned_range(shape[0], middle[0], zoom), _aligned_range(shape[1], middle[1], zoom))


def crops_for(
    prompts: Sequence[SlicePrompt], shape: tuple[int, int], model: SAMModel, min_tokens: float
) -> dict[Crop, list[int]]:
    """The crops that SAM has to be shown, each with the numbers of its prompts: the whole slice serves all of them."""
    found: dict[Crop, list[int]] = {full_crop(shape): list(range(len(prompts)))} if prompts else {}
    for n, prompt in enumerate(prompts):
        crop = crop_for(prompt, shape, model, min_tokens)
        if crop != full_crop(shape):
            found.setdefault(crop, []).append(n)
    return found


def merge_crops(answers: Sequence[tuple[Crop, np.ndarray, float]], shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Join the answers on several crops to one on the slice.

    Args:
        answers: Crop, probabilities (i, j) on it, and the IoU that SAM predicts.
        shape: (i, j) of the slice.

    Returns:
        Probabilities (i, j) on the slice, where crops overlap their mean weighted with the fourth power of the
        predicted IoU, 0 outside of all; and the predicted IoU, weighted alike.
    """
    total, weights, scores = np.zeros(shape, np.float32), np.zeros(shape, np.float32), []
    for crop, probability, iou in answers:
        weight = max(iou, MIN_IOU) ** IOU_POWER
        total[crop.index] += np.float32(weight) * probability
        weights[crop.index] += np.float32(weight)
        scores.append((iou, weight))
    np.divide(total, weights, out=total, where=weights > 0)
    return total, sum(iou * w for iou, w in scores) / sum(w for _, w in scores)


def _extent(prompt: SlicePrompt) -> tuple[float, float, float, float] | None:
    box = prompt.box
    if box is None and prompt.mask is not None:
        inside = prompt.mask >= 0.5
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if len(rows):
            box = to_box((rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1))
    if box is None:
        return None
    clicked = prompt.points[prompt.point_labels == 1]
    low = np.minimum(box[:2], clicked.min(0, initial=np.inf))
    high = np.maximum(box[2:], clicked.max(0, initial=-np.inf) + 1)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _aligned_range(size: int, middle: float, zoom: int) -> tuple[int, int]:
    """The aligned range of ``size / zoom`` pixels whose middle is nearest to ``middle``."""
    edge = math.ceil(size / zoom)
    step = max(1, edge // STARTS_PER_EDGE)
    start = round((middle - edge / 2) / step) * step
    start = min(max(start, 0), size - edge)
    return start, start + edge
