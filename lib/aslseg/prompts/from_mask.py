"""Prompts for SAM from the SSL model's mask (docs/science.md §1.2)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from aslseg.prompts.frame import SlicePrompt, box_slices, to_box, to_xy
from aslseg.settings import Settings

EIGHT_NEIGHBOURS = np.ones((3, 3), int)


def slice_prompts(region: np.ndarray, probability: np.ndarray, settings: Settings, scale: float) -> list[SlicePrompt]:
    """One prompt for every 2-D component of a region on a slice.

    The box is the component's, widened by ``box_margin``. The point lies deepest inside the component, by distance
    transform; where several pixels are equally deep, it is the first in array order. The mask is the probability inside
    the component widened by the same margin.

    Args:
        region: (i, j) bool.
        probability: (i, j) float32 in 0..1 that ``region`` was cut from.
        settings: ``box_margin`` and ``min_component``, both in pixels of SAM's input.
        scale: Pixels of SAM's input per pixel of the slice.

    Returns:
        Prompts in slice pixels, in the order of :func:`scipy.ndimage.label`; empty for an empty region.
    """
    components, _ = ndimage.label(region, EIGHT_NEIGHBOURS)
    margin = settings.box_margin / scale
    prompts = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(components), 1):
        component = components[rows, columns] == number
        if component.sum() * scale**2 < settings.min_component:
            continue
        box = to_box((rows.start - margin, rows.stop + margin), (columns.start - margin, columns.stop + margin))
        inside = box_slices(box, 0, (region.shape[0], region.shape[1]))
        point = _deepest(component) + np.array([rows.start, columns.start])
        grown = components[inside] == number
        if margin >= 1:
            grown = ndimage.binary_dilation(grown, EIGHT_NEIGHBOURS, iterations=int(margin))
        mask = np.zeros(region.shape, np.float32)
        mask[inside] = np.where(grown, probability[inside], 0)
        prompts.append(SlicePrompt(box, to_xy(point), np.ones(1, int), mask))
    return prompts


def _deepest(mask: np.ndarray) -> np.ndarray:
    """(1, 2) pixel (i, j) that is farthest from everything outside a bool mask; the array's edge is outside."""
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return np.array([np.unravel_index(int(distance.argmax()), mask.shape)])
