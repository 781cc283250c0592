"""CFR's canvases: the layout of its own code where that works, and what that code gets wrong."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from aslseg.errors import BadSettingsError
from aslseg.sam.cfr.stitch import IGNORED, Layout, monotone_map


def ramp(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    count = int(np.prod(shape))
    image = (np.arange(count) % 997).astype("<f4").reshape(shape)
    return image, ((np.arange(count) // 7) % 2).astype(np.uint8).reshape(shape)


def sha1(array: np.ndarray) -> str:
    return hashlib.sha1(array.tobytes(), usedforsecurity=False).hexdigest()[:12]


@pytest.mark.parametrize(
    ("shape", "grid", "margins", "origin", "ignored", "ones", "total", "hashes"),
    [
        (
            (112, 112, 80),
            (9, 9),
            (1, 1),
            (-1, -1),
            45056,
            501760,
            499629489,
            ("30ca878f4392", "9556e960263b"),
        ),
        ((128, 128, 64), (8, 8), (0, 0), (0, 0), 0, 524286, 522093162, ("117e6ae64c1a", "375229c0427d")),
    ],
)
def test_canvases_are_those_of_cfrs_code(
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    margins: tuple[int, int],
    origin: tuple[int, int],
    ignored: int,
    ones: int,
    total: int,
    hashes: tuple[str, str],
) -> None:
    """Numbers of the official function without its intensity map (docs/science.md §2.1)."""
    image, label = ramp(shape)
    layout = Layout.of(shape, 1024)
    assert (layout.rows, layout.columns, layout.margins, layout.origin) == (*grid, margins, origin)
    canvas, labels = layout.stitch(image, 0), layout.stitch(label, IGNORED)
    assert canvas.shape == labels.shape == (1, 1024, 1024)
    assert (labels == 255).sum() == ignored
    assert (labels == 1).sum() == ones
    assert canvas.sum(dtype=np.float64) == total
    assert (sha1(canvas), sha1(labels)) == hashes


def test_a_small_canvas_by_hand() -> None:
    volume = np.arange(1, 13).reshape(2, 3, 2)  # [i, j, k]: 1 + 6 i + 2 j + k
    canvas = Layout.of((2, 3, 2), 8).stitch(volume, 0)
    expected = np.zeros((8, 8), int)
    # 2 rows of 4 tiles, a margin of round(0.5) = 0 rows; two slices in the middle of eight tiles: number 3 and 4
    expected[1:4, 6:8] = [[1, 7], [3, 9], [5, 11]]
    expected[4:7, 0:2] = [[2, 8], [4, 10], [6, 12]]
    np.testing.assert_array_equal(canvas[0], expected)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((144, 112, 80), 1024),  # the official function gives an empty canvas
        ((112, 144, 80), 1024),
        ((125, 125, 70), 1024),  # rounding up would push two rows of every border slice off the canvas
        ((300, 200, 90), 1024),
        ((192, 192, 3), 192),
        ((97, 64, 5), 192),
        ((33, 61, 200), 192),
        ((5, 7, 1), 64),
    ],
)
def test_nothing_is_lost(shape: tuple[int, int, int], size: int) -> None:
    image, label = ramp(shape)
    layout = Layout.of(shape, size)
    canvases, labels = layout.stitch(image, -1), layout.stitch(label, IGNORED)
    tiles = (size // shape[1]) * (size // shape[0])
    assert canvases.shape == (-(-shape[2] // tiles), size, size)
    assert (labels != IGNORED).sum() == image.size
    assert (canvases != -1).sum() == image.size
    np.testing.assert_array_equal(layout.cut(canvases), image)
    np.testing.assert_array_equal(layout.cut(np.stack([canvases, -canvases], 1)), np.stack([image, -image]))


@pytest.mark.parametrize("edge", range(20, 65))
def test_every_edge_fits(edge: int) -> None:
    layout = Layout.of((edge, 65 - edge + 19, 40), 256)
    image, _ = ramp(layout.shape)
    np.testing.assert_array_equal(layout.cut(layout.stitch(image, -1)), image)


def test_slices_larger_than_the_canvas_are_refused() -> None:
    with pytest.raises(BadSettingsError, match=r"200 x 100 pixels.*canvas of 192.*sam_canvas to 200"):
        Layout.of((200, 100, 5), 192)


def test_the_intensity_map_increases_from_0_to_1() -> None:
    values = np.linspace(0, 1, 301, dtype=np.float32)
    seen = []
    for seed in range(30):
        mapped = monotone_map(values, np.random.default_rng(seed))
        assert mapped.dtype == np.float32
        assert (mapped[0], mapped[-1]) == (0, 1)
        assert (np.diff(mapped) >= 0).all()
        seen.append(float(mapped[150]))
    assert min(seen) < 0.35
    assert max(seen) > 0.65


class Fixed(np.random.Generator):
    """Gives the control points that it is made with."""

    def __init__(self, points: list[list[float]]) -> None:
        super().__init__(np.random.PCG64(0))
        self.points = np.array(points)

    def random(self, *_: object, **__: object) -> np.ndarray:  # type: ignore[override]
        return self.points


def test_the_intensity_map_is_the_bezier_curve() -> None:
    values = np.linspace(0, 1, 11)
    np.testing.assert_allclose(monotone_map(values, Fixed([[1 / 3, 1 / 3], [2 / 3, 2 / 3]])), values, atol=1e-6)
    # x = 3 t (1 - t)^2 / 3 + 3 t^2 (1 - t) 2 / 3 + t^3 = t and y = 3 t^2 (1 - t) + t^3
    curve = 3 * values**2 * (1 - values) + values**3
    np.testing.assert_allclose(monotone_map(values, Fixed([[1 / 3, 0], [2 / 3, 1]])), curve, atol=1e-6)
