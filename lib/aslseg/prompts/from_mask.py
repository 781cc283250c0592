"""Prompts from a mask: what the SSL model found is what SAM is asked to redraw (science.md, section 1.2)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from aslseg.prompts.frame import SlicePrompt, box_slices, to_box, to_xy
from aslseg.settings import Settings

EIGHT_NEIGHBOURS = np.ones((3, 3), int)


def slice_prompts(region: np.ndarray, probability: np.ndarray, settings: Settings, scale: float) -> list[SlicePrompt]:
    """One prompt for every 2-D component of a region on a slice.

    The box is the component's, widened by ``box_margin``. The first positive point lies deepest inside the component,
    by distance transform; the first negative one deepest outside the region within the box. Each further point lies
    farthest from the edge and from the points before it. Where several pixels are equally deep, the first in array
    order. The mask is the probability inside the component widened by the same margin.

    Args:
        region: (i, j) bool.
        probability: (i, j) float32 in 0..1 that ``region`` was cut from.
        settings: ``box_margin`` and ``min_component``, both in pixels of SAM's input; ``positive_points`` and
            ``negative_points``, of which small components get fewer.
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
        start, corner = [rows.start, columns.start], [inside[0].start, inside[1].start]
        positive = _deepest(component, settings.positive_points, edge=False) + start
        negative = _deepest(~region[inside], settings.negative_points, edge=True) + corner
        grown = components[inside] == number
        if margin >= 1:
            grown = ndimage.binary_dilation(grown, EIGHT_NEIGHBOURS, iterations=int(margin))
        mask = np.zeros(region.shape, np.float32)
        mask[inside] = np.where(grown, probability[inside], 0)
        labels = np.repeat([1, 0], [len(positive), len(negative)])
        prompts.append(SlicePrompt(box, to_xy(np.concatenate([positive, negative])), labels, mask))
    return prompts


def _deepest(mask: np.ndarray, count: int, *, edge: bool) -> np.ndarray:
    """(n, 2) pixels (i, j), each the farthest from everything outside ``mask`` and from those before it.

    The array's edge is outside unless ``edge``. At most ``count``, fewer where the mask is used up.
    """
    found = np.zeros((0, 2), np.int64)
    open_pixels = np.pad(mask, 1, mode="edge" if edge else "constant")
    while len(found) < count and open_pixels[1:-1, 1:-1].any():
        if open_pixels.all():  # nothing outside: no distance is defined, take the middle
            pixel = np.array(mask.shape) // 2
        else:
            distance = ndimage.distance_transform_edt(open_pixels)[1:-1, 1:-1]
            pixel = np.array(np.unravel_index(int(distance.argmax()), mask.shape))
        found = np.concatenate([found, pixel[None]])
        open_pixels[tuple(pixel + 1)] = False
    return found
