"""Patch sampling: shapes, padding, weights, foreground and human shares, repeatability."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aslseg.cases.patches import KEPT_VOXELS, PatchSampler
from aslseg.cases.prepare import automatic_patch
from aslseg.cases.prepared import Prepared
from aslseg.settings import load_settings
from aslseg.types import Volume
from aslseg.volume.geometry import Grid


def case(shape: tuple[int, int, int] = (20, 18, 12), name: str = "a") -> Prepared:
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / np.prod(shape)
    label = np.zeros(shape, np.uint8)
    label[3, 4, 5] = 1
    return Prepared(name, name, image, Grid.of(Volume(image, np.eye(4)), None), label)


def test_crops_come_from_one_place_in_image_and_label():
    one = case()
    sampler = PatchSampler([one], (8, 8, 8), 1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        patch = sampler.draw(rng)
        assert patch.image.shape == patch.label.shape == patch.weight.shape == (8, 8, 8)
        assert (patch.image[patch.label == 1] == one.image[3, 4, 5]).all()
        assert (patch.weight == 1).all()


def test_half_of_the_patches_hold_a_rare_class():
    sampler = PatchSampler([case((60, 60, 40))], (8, 8, 8), 1)
    rng = np.random.default_rng(0)
    share = np.mean([sampler.draw(rng).label.any() for _ in range(400)])
    assert 0.4 < share < 0.62


def test_small_scans_are_padded_with_weight_zero():
    patch = PatchSampler([case((6, 20, 12))], (8, 8, 8), 1).draw(np.random.default_rng(1))
    assert patch.image.shape == (8, 8, 8)
    assert patch.weight.sum() == 6 * 8 * 8
    assert (patch.image[patch.weight == 0] == 0).all()


def test_promoted_cases_carry_their_weights_and_half_of_the_draws():
    promoted = [
        replace(case(name=str(n)), weight=0.5, voxel_weight=np.full((20, 18, 12), 0.25, np.float16)) for n in range(9)
    ]
    sampler = PatchSampler([case(), *promoted], (8, 8, 8), 1)
    rng = np.random.default_rng(0)
    weights = [float(sampler.draw(rng).weight.max()) for _ in range(300)]
    assert set(weights) == {1.0, 0.125}
    assert 0.4 < np.mean([w == 1.0 for w in weights]) < 0.6


def test_unlabelled_cases_have_empty_labels():
    free = replace(case(), label=None)
    patch = PatchSampler([free], (8, 8, 8), 1).draw(np.random.default_rng(0))
    assert not patch.label.any()


def test_the_same_generator_draws_the_same_patch():
    sampler = PatchSampler([case()], (8, 8, 8), 1)
    one, two = (sampler.draw(np.random.default_rng([5, 7])) for _ in range(2))
    assert np.array_equal(one.image, two.image)


def test_foreground_voxels_are_a_bounded_choice_of_all_of_them():
    rng = np.random.default_rng(3)
    label = rng.choice(4, (90, 80, 70), p=[0.4, 0.595, 0.005, 0.0]).astype(np.uint8)
    one = replace(case((90, 80, 70)), label=label)
    found = PatchSampler([one], (8, 8, 8), 3).foreground[0]
    assert sorted(found) == [1, 2]
    fixed = np.random.default_rng(0)
    for value, voxels in found.items():
        everywhere = np.flatnonzero(label == value)
        assert len(voxels) == min(len(everywhere), KEPT_VOXELS)
        # the same choice as from a list of all of them
        assert np.array_equal(voxels, fixed.choice(everywhere, len(voxels), replace=False))


@pytest.mark.parametrize(
    ("shapes", "conf", "expected"),
    [
        ([(95, 71, 44)], {}, (64, 64, 48)),
        ([(40, 40, 10)], {}, (48, 48, 16)),
        ([(512, 512, 100)], {"patch": "90,70,20"}, (96, 64, 16)),
        ([(512, 512, 100)], {"patch": "8,8,8"}, (32, 32, 16)),
    ],
)
def test_automatic_patch(shapes, conf, expected):
    assert automatic_patch(shapes, load_settings(conf, env={})[0]) == expected
