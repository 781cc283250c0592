"""The bounding box of a mask, of any number of axes and any memory layout."""

from __future__ import annotations

import numpy as np

from aslseg.compute.bounding_box import bounding_box


def test_the_box_holds_all_elements_and_no_more() -> None:
    mask = np.zeros((6, 5, 4), bool)
    assert bounding_box(mask) is None
    mask[1, 4, 2] = mask[3, 0, 2] = True
    assert bounding_box(mask) == (slice(1, 4), slice(0, 5), slice(2, 3))
    assert bounding_box(mask.transpose(2, 0, 1)[::-1]) == (slice(1, 2), slice(1, 4), slice(0, 5))
    assert bounding_box(mask[3]) == (slice(0, 1), slice(2, 3))
    assert bounding_box(np.ones((2, 2), bool)) == (slice(0, 2), slice(0, 2))
