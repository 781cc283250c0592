from __future__ import annotations

import numpy as np
import pytest

from aslseg.prompts.frame import box_slices, to_box, to_xy
from aslseg.prompts.from_mask import slice_prompts
from aslseg.settings import Settings

SETTINGS = Settings(box_margin=3, min_component=9)


def test_x_is_the_column_and_y_the_row() -> None:
    assert to_xy(np.array([[2, 7], [0, 5]])).tolist() == [[7.0, 2.0], [5.0, 0.0]]
    assert to_xy(np.zeros((0, 2))).shape == (0, 2)
    assert to_box((2, 4), (10, 30)) == (10.0, 2.0, 30.0, 4.0)


def test_box_slices_widen_and_stay_inside() -> None:
    rows, columns = box_slices((10, 2, 30, 4), 3, (50, 32))
    assert (rows, columns) == (slice(0, 7), slice(7, 32))
    assert box_slices(None, 3, (50, 32)) == (slice(0, 50), slice(0, 32))
    rows, columns = box_slices((-20, -20, -10, -10), 1, (50, 32))
    assert np.zeros((50, 32))[rows, columns].size == 0


def test_an_asymmetric_mask_keeps_its_axes() -> None:
    """Two rows high, twenty columns wide, near the top: x runs along the columns."""
    region = np.zeros((40, 60), bool)
    region[5:8, 30:51] = True
    (prompt,) = slice_prompts(region, region.astype(np.float32) * 0.9, SETTINGS, scale=1)
    assert prompt.box == (27, 2, 54, 11)
    assert prompt.points.tolist() == [[31.0, 6.0]]  # first of the equally deep pixels, row 6
    assert prompt.point_labels.tolist() == [1]
    assert prompt.mask is not None
    assert prompt.mask.shape == (40, 60)
    assert np.array_equal(prompt.mask > 0, region)


def test_margins_are_in_pixels_of_sams_input() -> None:
    region = np.zeros((40, 40), bool)
    region[10:20, 10:20] = True
    (prompt,) = slice_prompts(region, region.astype(np.float32), SETTINGS, scale=2)
    assert prompt.box == (8.5, 8.5, 21.5, 21.5)


def test_one_prompt_for_each_component_and_diagonals_connect() -> None:
    region = np.zeros((40, 40), bool)
    region[2:6, 2:6] = True
    region[6:10, 6:10] = True  # touches the first at a corner
    region[25:30, 30:38] = True
    prompts = slice_prompts(region, region.astype(np.float32), SETTINGS, scale=1)
    assert [p.box for p in prompts] == [(-1, -1, 13, 13), (27, 22, 41, 33)]


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0), (2.0, 1)])
def test_small_components_are_measured_at_sams_scale(scale: float, expected: int) -> None:
    region = np.zeros((20, 20), bool)
    region[5:7, 5:8] = True  # 6 pixels
    assert len(slice_prompts(region, region.astype(np.float32), SETTINGS, scale)) == expected


def test_empty_and_full_slices() -> None:
    nothing = np.zeros((20, 20), bool)
    assert slice_prompts(nothing, nothing.astype(np.float32), SETTINGS, 1) == []
    (prompt,) = slice_prompts(~nothing, np.ones((20, 20), np.float32), SETTINGS, 1)
    assert prompt.box == (-3, -3, 23, 23)
    assert prompt.point_labels.tolist() == [1]


def test_the_point_lies_inside_a_ring() -> None:
    i, j = np.ogrid[:41, :41]
    distance = np.hypot(i - 20, j - 20)
    ring = (distance < 15) & (distance > 12)
    (prompt,) = slice_prompts(ring, ring.astype(np.float32), SETTINGS, 1)
    ((x, y),) = prompt.points.astype(int)
    assert ring[y, x]
    assert prompt.point_labels.tolist() == [1]


def test_the_mask_holds_only_the_components_own_surroundings() -> None:
    region = np.zeros((40, 40), bool)
    region[5:12, 5:12] = True
    region[5:12, 14:21] = True
    probability = np.full((40, 40), 0.2, np.float32)
    probability[region] = 0.8
    first, second = slice_prompts(region, probability, SETTINGS, 1)
    assert first.mask is not None
    assert second.mask is not None
    assert first.mask[8, 8] == pytest.approx(0.8)
    assert first.mask[4, 4] == pytest.approx(0.2)
    assert first.mask[8, 17] == 0
    assert first.mask[25:].sum() == 0
    assert second.mask[8, 8] == 0


def test_the_same_mask_gives_the_same_prompts() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random((30, 30)).astype(np.float32)
    a, b = (slice_prompts(probability > 0.6, probability, SETTINGS, 3) for _ in range(2))
    assert len(a) == len(b) > 1
    for one, other in zip(a, b, strict=True):
        assert one.box == other.box
        assert np.array_equal(one.points, other.points)
        assert np.array_equal(one.mask, other.mask)
