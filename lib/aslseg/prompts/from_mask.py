"""Prompts from a mask: what the SSL model found is what SAM is asked to redraw (science.md, section 1.2)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from aslseg.prompts.frame import SlicePrompt, box_slices, to_box, to_xy
from aslseg.settings import Settings

EIGHT_NEIGHBOURS = np.ones((3, 3), int)


def slice_prompts(
    region: np.ndarray,
    probability: np.ndarray,
    settings: Settings,
    scale: float,
    *,
    negative_point: bool = False,
) -> list[SlicePrompt]:
    """One prompt for every 2-D component of a region on a slice.

    The box is the component's, widened by ``box_margin``. The positive point lies deepest inside the component, by
    distance transform; where several pixels are equally deep, the first in array order. The mask is the probability
    inside the component widened by the same margin.

    Args:
        region: (i, j) bool.
        probability: (i, j) float32 in 0..1 that ``region`` was cut from.
        settings: ``box_margin`` and ``min_component``, both in pixels of SAM's input.
        scale: Pixels of SAM's input per pixel of the slice.
        negative_point: Add the point deepest outside the region within the box, labelled 0, if there is one.

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
        start = np.array([rows.start, columns.start])
        points, labels = [_deepest(component, edge=False) + start], [1]
        inside = box_slices(box, 0, (region.shape[0], region.shape[1]))
        outside = ~region[inside]
        if negative_point and outside.any():
            points.append(_deepest(outside, edge=True) + np.array([inside[0].start, inside[1].start]))
            labels.append(0)
        grown = components[inside] == number
        if margin >= 1:
            grown = ndimage.binary_dilation(grown, EIGHT_NEIGHBOURS, iterations=int(margin))
        mask = np.zeros(region.shape, np.float32)
        mask[inside] = np.where(grown, probability[inside], 0)
        prompts.append(SlicePrompt(box, to_xy(np.array(points)), np.array(labels), mask))
    return prompts


def _deepest(mask: np.ndarray, *, edge: bool) -> np.ndarray:
    """(i, j) of the pixel farthest from everything outside ``mask``; the array's edge is outside unless ``edge``."""
    padded = np.pad(mask, 1, mode="edge" if edge else "constant")
    if padded.all():  # nothing outside: no distance is defined, take the middle
        return np.array(mask.shape) // 2
    distance = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    return np.array(np.unravel_index(int(distance.argmax()), mask.shape))
