"""At small objects SAM looks twice: at the whole slice, and at a tile of it, enlarged to what the slice would be.

The whole says where in the body this is, the tile what it looks like. Which of them sees more depends on the object
(docs/results.md): its two answers are averaged by the IoU that SAM predicts for each. Tiles have a half or a quarter of
the slice's edges and begin at multiples of a quarter of their own, so that prompts that differ a little meet the same
tile, and with it the same embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aslseg.prompts.frame import SlicePrompt, to_box
from aslseg.sam.modeling.build import SAMModel

MOST = 4  # times enlarged
STEPS = 4  # places where a tile may begin within its own edge
POWER, LEAST_BELIEF = 4, 0.01  # of the predicted IoU as a weight
ROOM = 1 - 1 / STEPS  # of a tile: what is not longer lies within the nearest one


@dataclass(frozen=True)
class Crop:
    """The part of a slice (i, j) that SAM is shown: rows and columns, half-open."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(i, j) of the part."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def index(self) -> tuple[slice, slice]:
        """For arrays whose last two axes are the slice's: ``array[..., *view.index]``."""
        return slice(*self.rows), slice(*self.columns)

    def seen(self, prompt: SlicePrompt) -> SlicePrompt:
        """A prompt in the part's pixels; clicks that lie elsewhere are left out."""
        corner = np.array([self.columns[0], self.rows[0]])
        points = prompt.points - corner
        inside = ((points >= -0.5) & (points < np.array(self.shape[::-1]) - 0.5)).all(1)
        box = None
        if prompt.box is not None:
            x0, y0, x1, y1 = np.array(prompt.box) - np.tile(corner, 2)
            box = (float(x0), float(y0), float(x1), float(y1))
        mask = None if prompt.mask is None else np.ascontiguousarray(prompt.mask[self.index])
        return SlicePrompt(box, points[inside], prompt.point_labels[inside], mask)

    def near(self, rows: slice, columns: slice) -> Crop:
        """What this view has of some rows and columns of the slice."""
        (i0, i1), (j0, j1) = self.rows, self.columns
        return Crop((max(i0, rows.start), min(i1, rows.stop)), (max(j0, columns.start), min(j1, columns.stop)))

    def index_in(self, other: Crop) -> tuple[slice, slice]:
        """As :attr:`index`, for arrays that are another view's."""
        i, j = other.rows[0], other.columns[0]
        return slice(self.rows[0] - i, self.rows[1] - i), slice(self.columns[0] - j, self.columns[1] - j)


def whole(shape: tuple[int, int]) -> Crop:
    """The view of all of a slice (i, j)."""
    return Crop((0, shape[0]), (0, shape[1]))


def crop_for(prompt: SlicePrompt, shape: tuple[int, int], model: SAMModel, least: float) -> Crop:
    """The tile around a prompt's object: enlarged twice, or four times, if it is shorter than ``least`` tokens.

    The object is the prompt's box, or else what its mask holds, with all clicks inside the object. Without either
    its size is not known, and SAM is shown everything.

    Args:
        prompt: In pixels of the slice.
        shape: (i, j) of the slice.
        model: Says how large a token is.
        least: Setting ``sam_zoom``; 0: nothing is enlarged.
    """
    box = _extent(prompt)
    if box is None or not least:
        return whole(shape)
    x0, y0, x1, y1 = box
    x_scale, y_scale = model.scale(shape)
    tokens = max((x1 - x0) * x_scale, (y1 - y0) * y_scale) / model.architecture.patch_size
    zoom, part = 1, max((y1 - y0) / shape[0], (x1 - x0) / shape[1])
    while zoom < MOST and tokens * zoom < least and 2 * zoom * part <= ROOM:
        zoom *= 2
    if zoom == 1:
        return whole(shape)
    return Crop(_tile(shape[0], (y0 + y1) / 2, zoom), _tile(shape[1], (x0 + x1) / 2, zoom))


def crops_for(
    prompts: Sequence[SlicePrompt], shape: tuple[int, int], model: SAMModel, least: float
) -> dict[Crop, list[int]]:
    """What SAM has to look at, and for which prompts (their numbers): for all at the whole, for small ones twice."""
    found: dict[Crop, list[int]] = {whole(shape): list(range(len(prompts)))} if prompts else {}
    for n, prompt in enumerate(prompts):
        view = crop_for(prompt, shape, model, least)
        if view != whole(shape):
            found.setdefault(view, []).append(n)
    return found


def merge_crops(answers: Sequence[tuple[Crop, np.ndarray, float]], shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    """One answer from those to several views.

    Args:
        answers: View, probabilities (i, j) on it, and the IoU that SAM predicts.
        shape: (i, j) of the slice.

    Returns:
        Probabilities (i, j) on the slice, where views overlap their mean weighted with the fourth power of the
        predicted IoU, 0 outside of all; and the predicted IoU, weighted alike.
    """
    total, weights, beliefs = np.zeros(shape, np.float32), np.zeros(shape, np.float32), []
    for view, probability, belief in answers:
        weight = max(belief, LEAST_BELIEF) ** POWER
        total[view.index] += np.float32(weight) * probability
        weights[view.index] += np.float32(weight)
        beliefs.append((belief, weight))
    np.divide(total, weights, out=total, where=weights > 0)
    return total, sum(b * w for b, w in beliefs) / sum(w for _, w in beliefs)


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


def _tile(size: int, middle: float, zoom: int) -> tuple[int, int]:
    """The aligned range of ``size / zoom`` pixels whose middle is nearest to ``middle``."""
    edge = math.ceil(size / zoom)
    step = max(1, edge // STEPS)
    start = round((middle - edge / 2) / step) * step
    start = min(max(start, 0), size - edge)
    return start, start + edge
