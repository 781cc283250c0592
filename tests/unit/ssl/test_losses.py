"""Losses and ramps against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from aslseg.ssl.losses import clipped_noise, consistency_loss, foreground_fraction, segmentation_loss
from aslseg.ssl.ramps import ema_update, polynomial, sigmoid_ramp


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


def test_ramps():
    assert sigmoid_ramp(0) == pytest.approx(math.exp(-5))
    assert sigmoid_ramp(0.5) == pytest.approx(math.exp(-1.25))
    assert sigmoid_ramp(1) == sigmoid_ramp(7) == 1
    assert polynomial(0) == 1
    assert polynomial(1) == 0
    assert polynomial(0.5) == pytest.approx(0.5**0.9)


def test_ema_by_hand():
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    teacher.weight.data.fill_(1.0)
    student.weight.data.fill_(3.0)
    ema_update(teacher, student, step=0, decay=0.99)
    assert teacher.weight.item() == 3.0  # a = 1 - 1/1 = 0: the first step copies
    student.weight.data.fill_(5.0)
    ema_update(teacher, student, step=1, decay=0.99)
    assert teacher.weight.item() == 4.0  # a = 1/2
    ema_update(teacher, student, step=10_000, decay=0.99)
    assert teacher.weight.item() == pytest.approx(4.01)
