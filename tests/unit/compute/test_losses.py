"""Losses against values worked out by hand or independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aslseg.compute.losses import (
    certain_consistency_loss,
    classes_known,
    clipped_noise,
    consistency_loss,
    dice_loss,
    foreground_fraction,
    merge_unknown,
    predictive_entropy,
    region_loss,
    segmentation_loss,
    weighted_mean,
)
from aslseg.types import Labels


def logits_of(probability: float, voxels: int = 4) -> torch.Tensor:
    p = torch.full((1, voxels, 1, 1), probability)
    return torch.stack([torch.log(1 - p), torch.log(p)], 1)


def test_segmentation_loss_by_hand():
    # four voxels, two of them foreground, p = 0.5 everywhere:
    # CE = ln 2; Dice = 1 - 2 * (2 * 0.5) / (4 * 0.25 + 2) = 1 - 2 / 3
    target = torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1)
    loss = segmentation_loss(logits_of(0.5), target)
    assert loss.item() == pytest.approx(0.5 * (math.log(2) + 1 / 3), abs=1e-5)


def test_weighted_voxels_only_count_where_the_weight_is():
    target = torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1)
    weight = torch.tensor([1.0, 0, 0, 0]).reshape(1, 4, 1, 1)
    # one voxel left: CE = ln 2; Dice = 1 - 2 * 0.5 / (0.25 + 1) = 0.2
    loss = segmentation_loss(logits_of(0.5), target, weight)
    assert loss.item() == pytest.approx(0.5 * (math.log(2) + 0.2), abs=1e-5)


def test_zero_weight_gives_zero_loss_and_no_nan():
    logits = torch.randn(1, 2, 2, 2, 2, requires_grad=True)
    loss = segmentation_loss(logits, torch.ones(1, 2, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, 2))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()


def test_perfect_prediction_has_almost_no_loss():
    target = torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1)
    logits = torch.stack([20.0 * (target == 0), 20.0 * (target == 1)], 1)
    assert segmentation_loss(logits, target).item() < 1e-4


def test_consistency_by_hand_and_no_gradient_to_the_teacher():
    student = logits_of(0.5).requires_grad_()
    teacher = logits_of(0.8).requires_grad_()
    loss = consistency_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.09, abs=1e-6)
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_foreground_fraction():
    logits = torch.tensor([[0.0, 1, 2, 3], [1.0, 0, 3, 2]]).reshape(1, 2, 4, 1, 1)
    assert foreground_fraction(logits).item() == 0.5


def test_noise_is_clipped_and_repeatable():
    like = torch.zeros(1, 1, 20, 20, 20)
    one, two = (clipped_noise(like, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.abs().max().item() == pytest.approx(0.2)
    assert one.std().item() == pytest.approx(0.0975, abs=0.005)


def test_weighted_mean():
    values, weight = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([3.0, 1.0, 0.0])
    assert weighted_mean(values, weight).item() == 2
    assert weighted_mean(values, None).item() == 5
    assert weighted_mean(values, torch.zeros(3)).item() == 0


def test_dice_with_plain_and_squared_denominators():
    # p = 0.5 on four voxels, two foreground: plain 1 - 2 / (2 + 2) = 1/2, squared 1 - 2 / (1 + 2) = 1/3
    target = torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1)
    p = torch.full((1, 2, 4, 1, 1), 0.5)
    assert dice_loss(p, target, squared=False, epsilon=1e-8).item() == pytest.approx(1 / 2, abs=1e-6)
    assert dice_loss(p, target).item() == pytest.approx(1 / 3, abs=1e-5)
    # only the first voxel: plain 1 - 1 / 1.5, squared 1 - 1 / 1.25
    weight = torch.tensor([1.0, 0, 0, 0]).reshape(1, 4, 1, 1)
    assert dice_loss(p, target, weight, squared=False).item() == pytest.approx(1 / 3, abs=1e-5)
    assert dice_loss(p, target, weight).item() == pytest.approx(0.2, abs=1e-5)


def test_dice_averages_over_foreground_classes_and_sums_over_the_batch():
    # class 1 everywhere in patch 0, class 2 everywhere in patch 1; predicted: class 1 everywhere
    target = torch.tensor([1, 1, 2, 2]).reshape(2, 2, 1, 1)
    p = torch.zeros(2, 3, 2, 1, 1)
    p[:, 1] = 1
    # class 1: 1 - 2 * 2 / (4 + 2) = 1/3; class 2: 1 - 0 / 2 = 1
    assert dice_loss(p, target).item() == pytest.approx((1 / 3 + 1) / 2, abs=1e-5)


def test_region_loss_by_hand():
    # region: voxels 0 and 2 of four, one of them foreground, p = 0.8 for foreground everywhere
    # CE = (-ln 0.8 - ln 0.2) / 2
    # Dice: foreground 1 - 1.6 / (1.6 + 1), background 1 - 0.4 / (0.4 + 1)
    target = torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1)
    weight = torch.tensor([1.0, 0, 1, 0]).reshape(1, 4, 1, 1)
    ce = -(math.log(0.8) + math.log(0.2)) / 2
    dice = ((1 - 1.6 / 2.6) + (1 - 0.4 / 1.4)) / 2
    assert region_loss(logits_of(0.8), target, weight).item() == pytest.approx((ce + dice) / 2, abs=1e-5)
    # what lies outside the region does not matter, nor does a factor on all weights
    other = torch.tensor([1, 0, 0, 1]).reshape(1, 4, 1, 1)
    assert region_loss(logits_of(0.8), other, 3 * weight).item() == pytest.approx((ce + dice) / 2, abs=1e-5)


def test_region_loss_is_the_mean_over_patches_by_their_weights():
    rng = torch.Generator().manual_seed(2)
    logits, target = torch.randn(2, 3, 4, 4, 4, generator=rng), torch.randint(0, 3, (2, 4, 4, 4), generator=rng)
    one, two = (region_loss(logits[n : n + 1], target[n : n + 1], torch.ones(1, 4, 4, 4)).item() for n in (0, 1))
    weight = torch.ones(2, 4, 4, 4)
    assert region_loss(logits, target, weight).item() == pytest.approx((one + two) / 2, abs=1e-5)
    weight[1] = 0.5
    assert region_loss(logits, target, weight).item() == pytest.approx((2 * one + two) / 3, abs=1e-5)
    weight[1] = 0
    assert region_loss(logits, target, weight).item() == pytest.approx(one, abs=1e-5)
    assert region_loss(logits, target, torch.zeros(2, 4, 4, 4)).item() == 0


def test_region_loss_of_a_whole_patch_is_the_published_sum():
    rng = np.random.default_rng(4)
    z, y = rng.normal(size=(2, 3, 5, 4, 3)), rng.integers(0, 3, (2, 5, 4, 3))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    ce = -np.mean([np.log(p[b, y[b, i, j, k], i, j, k]) for b, i, j, k in np.ndindex(y.shape)])
    dice = [
        1 - (2 * p[b, c][y[b] == c].sum() + 1e-5) / (p[b, c].sum() + (y[b] == c).sum() + 1e-5)
        for b in range(2)
        for c in range(3)
    ]
    found = region_loss(torch.from_numpy(z), torch.from_numpy(y), torch.ones(y.shape))
    assert found.item() == pytest.approx((ce + np.mean(dice)) / 2, abs=1e-5)


def test_certain_consistency_by_hand():
    # p = (0.5, 0.5), q = (0.2, 0.8): each voxel adds 2 * 0.09; one certain voxel of four: 0.18 / (2 * 1)
    student, teacher = logits_of(0.5).requires_grad_(), logits_of(0.8).requires_grad_()
    certain = torch.tensor([True, False, False, False]).reshape(1, 4, 1, 1)
    loss = certain_consistency_loss(student, teacher, certain)
    assert loss.item() == pytest.approx(0.09, abs=1e-6)
    loss.backward()
    assert teacher.grad is None
    assert (student.grad[:, :, 0] != 0).all()
    assert (student.grad[:, :, 1:] == 0).all()


def test_certainty_everywhere_is_the_mean_teacher_and_nowhere_is_nothing():
    student, teacher = torch.randn(2, 4, 3, 3, 3), torch.randn(2, 4, 3, 3, 3)
    every = torch.ones(2, 3, 3, 3, dtype=torch.bool)
    plain = consistency_loss(student, teacher).item()
    assert certain_consistency_loss(student, teacher, every).item() == pytest.approx(plain, rel=1e-5)
    assert certain_consistency_loss(student, teacher, ~every).item() == 0


def test_entropy_of_knowing_nothing_and_everything():
    p = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, 0, 0], [0.5, 0.5, 0]]).reshape(3, 3, 1, 1, 1)
    found = predictive_entropy(p).flatten().tolist()
    assert found == pytest.approx([math.log(3), 0, math.log(2)], abs=1e-5)


def test_a_class_that_is_not_there_leaves_the_dice_term():
    torch.manual_seed(0)
    p = torch.rand(2, 3, 4, 4, 4).softmax(1)
    target = (torch.rand(2, 4, 4, 4) < 0.5).long()
    merged = torch.stack([p[:, 0] + p[:, 2], p[:, 1]], 1)
    assert dice_loss(p, target) == pytest.approx(dice_loss(merged, target).item())
    # with none there, what any class is given is still seen
    nothing = torch.zeros_like(target)
    assert dice_loss(p, nothing) == pytest.approx(1, abs=1e-5)
    # a class whose voxels all weigh nothing is not there
    target[0, 0, 0, 0] = 2
    weight = torch.ones(target.shape)
    weight[0, 0, 0, 0] = 0
    without = dice_loss(p, torch.where(target == 2, 0, target), weight)
    assert dice_loss(p, target, weight) == pytest.approx(without.item())


NESTED = Labels.parse("liver,tumour,cyst,kidney", "tumour:liver,cyst:liver")


def marked(*values: int) -> torch.Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def test_what_is_nested_and_unknown_counts_as_a_whole():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 4, 1, 1)
    # 5 = 4 labels + 1 + liver's index: the liver or anything in it
    merged, target = merge_unknown(logits, marked(0, 5, 2, 5), NESTED)
    assert target.flatten().tolist() == [0, 1, 2, 1]
    p, q = logits.softmax(1)[0, :, :, 0, 0], merged.softmax(1)[0, :, :, 0, 0]
    torch.testing.assert_close(q[:, [0, 2]], p[:, [0, 2]])
    torch.testing.assert_close(q[1, [1, 3]], p[[1, 2, 3]][:, [1, 3]].sum(0))
    torch.testing.assert_close(q[[0, 4]][:, [1, 3]], p[[0, 4]][:, [1, 3]])
    assert q[[2, 3]][:, [1, 3]].abs().max() == 0


def test_only_the_sum_of_unknown_classes_is_learned():
    logits = torch.zeros(1, 5, 1, 1, 1, requires_grad=True)
    loss = segmentation_loss(*merge_unknown(logits, marked(5), NESTED))
    (gradient,) = torch.autograd.grad(loss, logits)
    inside = gradient[0, [1, 2, 3], 0, 0, 0]
    # up together, and none of them against another
    assert (inside < 0).all()
    torch.testing.assert_close(inside, inside[:1].expand(3))


def test_a_target_in_which_all_is_known_is_left_alone():
    logits, target = torch.randn(1, 5, 4, 1, 1), marked(0, 1, 2, 4)
    assert merge_unknown(logits, target, NESTED)[0] is logits
    assert classes_known(target, NESTED).all()
    assert classes_known(marked(0, 5, 4), NESTED).tolist() == [[False, False, False, True]]
