from __future__ import annotations

import numpy as np
import torch

from aslseg.sam.clicks.automatic_mask import AutomaticMask


def test_a_coarser_grid_is_resampled_trilinearly() -> None:
    coarse = np.random.default_rng(0).random((5, 6, 4)).astype(np.float32)
    shape = (10, 15, 9)
    whole = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None, None], shape, mode="trilinear")[0, 0].numpy()
    automatic = AutomaticMask(coarse, shape)
    for k in range(9):
        np.testing.assert_allclose(automatic.slice(k), whole[..., k], atol=1e-5)
        assert np.array_equal(automatic.mask(k), whole[..., k] >= 0.5)


def test_the_same_grid_is_taken_as_it_is() -> None:
    array = np.random.default_rng(0).random((5, 6, 4)) > 0.5
    automatic = AutomaticMask(array, array.shape)
    assert automatic.slice(2).dtype == np.float32
    assert np.array_equal(automatic.slice(2), array[..., 2].astype(np.float32))


def test_an_empty_slice_has_no_mask() -> None:
    array = np.zeros((5, 6, 4), np.float32)
    array[2, 3, 1] = 0.7
    automatic = AutomaticMask(array, array.shape)
    assert automatic.mask(0) is None
    assert automatic.probability(0) is None
    for _ in range(2):
        assert np.argwhere(automatic.mask(1)).tolist() == [[2, 3]]
    assert automatic.probability(1).max() == np.float32(0.7)
