"""Which slice is drawn, which way up, and with which outlines."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from aslseg.review.pictures import Picture, outlined
from aslseg.settings import Settings, load_settings
from aslseg.types import Volume
from aslseg.volume.phantom import make_phantom

SHAPE = (40, 30, 8)


@pytest.fixture
def settings() -> Settings:
    return load_settings({}, env={})[0]


def pixels(picture: Picture | None) -> np.ndarray:
    """(rows, columns, 3) in 0..1."""
    assert picture is not None
    return imread(io.BytesIO(picture.png))[..., :3]


def brightest(picture: np.ndarray) -> tuple[float, float]:
    """Where a bright block lies, as parts of height and width."""
    rows, columns = np.nonzero(picture.min(-1) > 0.9)
    return float(rows.mean() / picture.shape[0]), float(columns.mean() / picture.shape[1])


def test_the_right_side_is_on_the_left_and_the_front_on_top(settings: Settings) -> None:
    scan = np.full(SHAPE, -500, np.float32)
    scan[30:36, 22:27, :] = 1000  # right and front of RAS axes
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:15, 5:15, 6] = 1
    row, column = brightest(pixels(outlined(Volume(scan, np.eye(4)), mask, settings)))
    assert 0.1 < row < 0.3
    assert 0.1 < column < 0.3


@pytest.mark.parametrize("flips", [(0,), (1,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_order_in_which_a_file_has_its_axes_does_not_matter(
    settings: Settings, flips: tuple[int, ...], order: tuple[int, int, int]
) -> None:
    scan, mask = make_phantom(3, 0, shape=(32, 24, 8))
    expected = outlined(scan, mask, settings)
    affine = scan.affine.copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (scan.array.shape[axis] - 1)
        affine[:3, axis] *= -1
    affine[:, :3] = affine[:, order]
    stored, label = (np.flip(a, flips).transpose(order) for a in (scan.array, mask))
    assert outlined(Volume(stored, affine), label, settings) == expected


def test_the_slice_on_which_the_label_is_largest(settings: Settings) -> None:
    scan, mask = Volume(np.zeros(SHAPE, np.float32), np.eye(4)), np.zeros(SHAPE, np.uint8)
    mask[2:30, 2:25, 2] = 1
    mask[4:10, 4:10, 5] = 2
    assert [getattr(outlined(scan, mask, settings, label), "slice", None) for label in (None, "liver", "tumour")] == [
        3,
        3,
        6,
    ]
    # a label that the mask does not hold, or that the settings do not know, stands for all
    mask[mask == 2] = 0
    assert [getattr(outlined(scan, mask, settings, label), "slice", None) for label in ("tumour", "spleen")] == [3, 3]
    assert outlined(scan, np.zeros(SHAPE, np.uint8), settings) is None
    with pytest.raises(ValueError, match="the mask has the shape"):
        outlined(scan, mask[1:], settings)


def test_outlines_are_closed_at_the_border_and_voxels_need_not_be_square(settings: Settings) -> None:
    scan = Volume(np.zeros(SHAPE, np.float32), np.diag([1.0, 3.0, 2.0, 1.0]))
    picture = pixels(outlined(scan, np.ones(SHAPE, np.uint8), settings))
    height, width = picture.shape[:2]
    assert height / width == pytest.approx(30 * 3 / 40, rel=0.02)
    blue = picture[..., 2] - picture[..., 0] > 0.3
    for edge in (blue[:3], blue[-3:], blue[:, :3], blue[:, -3:]):
        assert edge.any()
