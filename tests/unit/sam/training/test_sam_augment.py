from __future__ import annotations

import numpy as np
import pytest

from aslseg.sam.training.augment import augmented


def square(rows: slice, columns: slice, shape: tuple[int, int] = (90, 60)) -> np.ndarray:
    out = np.zeros(shape, np.float32)
    out[rows, columns] = 1
    return out


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_slice_and_objects_move_alike() -> None:
    slice_, moved = square(slice(20, 50), slice(10, 40)), 0
    for seed in range(20):
        image, maps = augmented(slice_, np.stack([slice_[None]] * 2), np.random.default_rng(seed), seed % 2 == 0)
        assert np.array_equal(maps[0], maps[1])
        bright = image > (image.max() + image.min()) / 2
        assert overlap(bright, maps[0, 0] > 0.5) > 0.9, seed
        moved += overlap(maps[0, 0] > 0.5, slice_ > 0.5) < 0.95
    assert moved > 10


def test_no_object_is_lost() -> None:
    corner, slice_ = square(slice(3), slice(3)), square(slice(20, 50), slice(10, 40))
    for seed in range(30):
        _, maps = augmented(slice_, np.stack([corner[None], slice_[None]]), np.random.default_rng(seed))
        assert maps[0].max() > 0.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 64)])
def test_any_shape_stays_in_range_and_repeats(shape: tuple[int, int]) -> None:
    slice_ = np.random.default_rng(0).random(shape, np.float32)
    maps = np.ones((2, 3, *shape), np.float32)
    one, two = (augmented(slice_, maps, np.random.default_rng(7)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a, b)
        assert a.dtype == np.float32
        assert a.min() >= 0
        assert a.max() <= 1
    assert one[0].shape == shape
    assert one[1].shape == maps.shape


def test_objects_are_bent_without_being_torn() -> None:
    slice_ = square(slice(30, 60), slice(15, 45))
    for seed in range(20):
        _, maps = augmented(slice_, np.stack([slice_[None]] * 2), np.random.default_rng(seed))
        assert 0.4 < (maps[0, 0] > 0.5).sum() / 900 < 2.2, seed
