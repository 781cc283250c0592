"""Corrections of SAM's answers where they contradict the clicks."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS

STRAY_FRACTION = 0.25  # of the largest component: smaller ones are removed
EDGE_FRACTION = 0.1  # of the radius, at least half a pixel: over so much the border of a disc fades


def enforce_clicks(probability: np.ndarray, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Change a mask where it contradicts a click: within a disc around the click.

    Annotators click into the middle of an error, which is as far from the drawn border as from the true one, so the
    disc reaches to the drawn border. It stays smaller where it could do harm: it ends half-way to the next click of the
    other kind, and its area is at most that of the mask.

    Args:
        probability: (i, j) in 0..1.
        points: Clicks (n, 2) as (x, y); later ones take precedence.
        labels: 1 in, 0 out, (n,).

    Returns:
        (i, j) float32, the array itself if nothing contradicts it. Nothing is added to an empty mask, which does not
        show how large the object is.
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
        edge = max(0.5, EDGE_FRACTION * radius)
        near = squared < (radius + 6 * edge) ** 2
        weight = 1 / (1 + np.exp((np.sqrt(squared[near]) - radius) / edge))
        found = found.astype(np.float32)
        found[near] = found[near] * (1 - weight) + weight * label
    return found


def remove_stray_components(probability: np.ndarray, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Remove components smaller than a quarter of the largest one that hold no click inside the object.

    Most of them are errors of SAM; a click inside brings a true one back.

    Args:
        probability: (i, j) in 0..1.
        points: Clicks (n, 2) as (x, y).
        labels: 1 in, 0 out, (n,).

    Returns:
        (i, j), zero in removed components; the array itself if there are none.
    """
    components, count = ndimage.label(probability >= 0.5, EIGHT_NEIGHBOURS)
    if count < 2:
        return probability
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    kept = sizes >= STRAY_FRACTION * sizes.max()
    clicked = points[labels == 1].astype(int)
    kept[components[clicked[:, 1], clicked[:, 0]]] = True
    kept[0] = True
    return probability if kept.all() else np.where(kept[components], probability, np.float32(0))
