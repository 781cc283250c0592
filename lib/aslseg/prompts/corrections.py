"""What clicks say about the pixels of an answer, for a SAM that does not listen."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS

STRAY = 0.25  # of the largest piece: smaller ones are strays
EDGE = 0.1  # of the radius, at least half a pixel: how far a disc's border fades


def enforce_clicks(probability: np.ndarray, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A mask in which every click is in or out as it says, with a disc around those that were not.

    Who clicks into the middle of an error is as far from the drawn border as from the true one, so all pixels that are
    nearer than the drawn border are wrong as well. Where more is at stake the disc stays smaller: it ends half-way to
    the next click of the other kind, and what is added is not larger than what was drawn. A third of all clicks
    contradict SAM's last answer otherwise (docs/results.md).

    Args:
        probability: (i, j) in 0..1.
        points: Clicks (n, 2) as (x, y), later ones outdo earlier ones.
        labels: 1 in, 0 out, (n,).

    Returns:
        (i, j) float32, the array itself if nothing contradicts it. Nothing is added to an empty mask: it does not say
        how large the object is.
    """
    found = probability
    rows, columns = (np.arange(n, dtype=np.float32) for n in probability.shape)
    for (x, y), label in zip(points, labels, strict=True):
        inside = found >= 0.5
        i, j = int(y), int(x)
        if inside[i, j] == bool(label) or not inside.any():
            continue
        squared = (rows[:, None] - i) ** 2 + (columns[None] - j) ** 2
        border = squared[inside if label else ~inside]
        others = points[labels != label].astype(int)
        reach = [
            float(np.sqrt(border.min())) if border.size else np.inf,
            np.sqrt(inside.sum() / np.pi),
            np.hypot(*(others - (j, i)).T).min(initial=np.inf) / 2,
        ]
        radius = max(1.0, min(reach))
        edge = max(0.5, EDGE * radius)
        near = squared < (radius + 6 * edge) ** 2
        weight = 1 / (1 + np.exp((np.sqrt(squared[near]) - radius) / edge))
        found = found.astype(np.float32)
        found[near] = found[near] * (1 - weight) + weight * label
    return found


def remove_stray_components(probability: np.ndarray, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A mask without its small pieces: those less than a quarter of the largest that hold no click inside the object.

    They are mistakes more often than not (docs/results.md), and one click brings a true one back.

    Args:
        probability: (i, j) in 0..1.
        points: Clicks (n, 2) as (x, y).
        labels: 1 in, 0 out, (n,).

    Returns:
        (i, j), zero at strays; the array itself if there are none.
    """
    pieces, count = ndimage.label(probability >= 0.5, EIGHT_NEIGHBOURS)
    if count < 2:
        return probability
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    kept = sizes >= STRAY * sizes.max()
    clicked = points[labels == 1].astype(int)
    kept[pieces[clicked[:, 1], clicked[:, 0]]] = True
    kept[0] = True
    return probability if kept.all() else np.where(kept[pieces], probability, np.float32(0))
