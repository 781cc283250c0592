"""Patch sampling: shapes, padding, weights, foreground and human shares, repeatability."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aslseg.cases.patches import KEPT_VOXELS, PatchSampler, RareClassSampler
from aslseg.cases.prepare import automatic_patch
from aslseg.cases.prepared_case import Prepared
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


def with_lesion(name: str = "a") -> Prepared:
    """A parent with a lesion of 8 x 8 x 8 voxels."""
    one = case((60, 60, 40), name)
    one.label[:] = 1
    one.label[4:12, 4:12, 4:12] = 2
    return one


def test_each_batch_holds_each_rare_class():
    bare = case((60, 60, 40), "bare")
    three = with_lesion("b")
    three.label[30, 30, 20] = 3
    sampler = RareClassSampler([bare, three], (8, 8, 8), 3, [2, 3])
    rng = np.random.default_rng(0)
    for _ in range(20):
        batch = sampler.draw_batch(rng, 3)
        assert len(batch) == 3
        assert {2, 3} <= {value for patch in batch for value in np.unique(patch.label)}
    # more rare classes than patches: each has its turn
    seen = {value for _ in range(20) for value in np.unique(sampler.draw_batch(rng, 1)[0].label)}
    assert {2, 3} <= seen


def test_without_the_rare_class_batches_are_drawn_as_ever():
    sampler, plain = (
        kind([case()], (8, 8, 8), 2, *more) for kind, more in ((RareClassSampler, [[2]]), (PatchSampler, []))
    )
    one, two = (s.draw_batch(np.random.default_rng(4), 3) for s in (sampler, plain))
    assert all((a.image == b.image).all() for a, b in zip(one, two, strict=True))


def test_rare_classes_of_humans_come_before_promoted_ones_half_of_the_time():
    promoted = replace(with_lesion("p"), weight=0.5, voxel_weight=np.ones((60, 60, 40), np.float16))
    sampler = RareClassSampler([with_lesion(), promoted], (8, 8, 8), 2, [2])
    rng = np.random.default_rng(0)
    human = np.mean([sampler.draw_batch(rng, 1)[0].weight.max() == 1 for _ in range(200)])
    assert 0.4 < human < 0.6


def test_patches_lie_around_voxels_of_an_outer_label_whose_inner_ones_are_open():
    one = case((60, 60, 40))
    # 3: the first of two labels, or anything in it
    label = np.where(one.label == 1, 3, 0).astype(np.uint8)
    sampler = PatchSampler([replace(one, label=label)], (8, 8, 8), 2)
    rng = np.random.default_rng(0)
    assert 0.4 < np.mean([(sampler.draw(rng).label == 3).any() for _ in range(400)]) < 0.62
