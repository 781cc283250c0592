"""The bounding box of a mask."""

from __future__ import annotations

import numpy as np


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box around all elements of a mask, as an index; None for an empty mask.

    Several times as fast on volumes as ``scipy.ndimage.find_objects``.

    Args:
        mask: Bool, of any number of axes.
    """
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not hit.size:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
