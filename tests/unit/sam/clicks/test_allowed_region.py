"""Where an object may lie: in its parent, and not on finished objects."""

from __future__ import annotations

import numpy as np
import pytest

from aslseg.sam.clicks.allowed_region import AllowedRegion
from aslseg.sam.clicks.automatic_mask import AutomaticMask

SHAPE = (12, 10, 3)


def volume(rows: slice, columns: slice, k: int = 1) -> np.ndarray:
    found = np.zeros(SHAPE, bool)
    found[rows, columns, k] = True
    return found


def test_without_limits_the_array_itself_comes_back() -> None:
    drawn, free = np.ones(SHAPE[:2], np.float32), AllowedRegion()
    assert free.cut(1, drawn) is drawn
    assert free.slice(1) is None
    assert free.holds(np.array([[0, 0, 0]])).all()
    assert free.bytes == 0


def test_the_parent_counts_with_its_holes_and_is_empty_where_it_ends() -> None:
    parent = volume(slice(2, 9), slice(2, 8))
    parent[5, 5, 1] = False
    region = AllowedRegion(AutomaticMask(parent.astype(np.float32), SHAPE))
    drawn = np.ones(SHAPE[:2], np.float32)
    assert region.cut(1, drawn).sum() == 7 * 6
    assert not region.cut(2, drawn).any()
    assert region.holds(np.array([[5, 5, 1], [0, 0, 1], [5, 5, 0]])).tolist() == [True, False, False]


def test_nothing_is_drawn_on_finished_objects_and_those_of_the_label_are_shown() -> None:
    finished, kept = volume(slice(0, 3), slice(None)), volume(slice(9, 12), slice(None))
    region, full = AllowedRegion(finished=finished, kept=kept), np.ones(SHAPE[:2], bool)
    assert np.flatnonzero(region.cut(1, full).any(1)).tolist() == list(range(3, 9))
    assert np.flatnonzero(region.without_finished(1, full).any(1)).tolist() == list(range(3, 12))
    assert region.cut(0, full) is full, "elsewhere everything is allowed"
    assert region.bytes == 2 * np.prod(SHAPE)


@pytest.mark.parametrize(("rows", "expected"), [(slice(2, 4), 1), (slice(None), 2)])
def test_the_plausible_size_follows_the_parent_and_the_slice(rows: slice, expected: int) -> None:
    shape = (20, 20)
    parent = np.zeros((*shape, 1), np.float32)
    parent[rows, :1] = 1
    found = AllowedRegion(AutomaticMask(parent, (*shape, 1))).plausible_area(0, shape)
    assert found == {1: 1, 2: 16}[expected]
    assert AllowedRegion().plausible_area(0, shape) == 40
