"""The monitor of each class: probabilities on its own voxels and elsewhere, and what counts as not learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aslseg.ssl.class_watch import class_probabilities, described, not_learned, warnings_of
from aslseg.ssl.methods.base import Batch


class Fixed(nn.Module):
    """Gives class 1 a probability of 0.8 where the image is positive, else 0.1; the others share the rest."""

    def forward(self, x):
        one = torch.where(x > 0, 0.8, 0.1)
        return torch.cat([(1 - one) / 2, one, (1 - one) / 2], 1).log()


def batch(weight: float = 1.0) -> Batch:
    image = torch.full((1, 1, 4, 4, 4), -1.0)
    image[:, :, :2] = 1
    target = (image[:, 0] > 0).long()
    return Batch(image, target, torch.full(target.shape, weight), image[:0], image[:0])


def test_own_voxels_and_all_others():
    network = Fixed().train()
    found = class_probabilities(network, [batch(), batch()], ["organ", "lesion"])
    assert found["organ"] == pytest.approx([0.8, 0.1])
    assert found["lesion"][0] is None
    assert found["lesion"][1] == pytest.approx((0.1 + 0.45) / 2)
    assert network.training


def test_voxels_without_weight_do_not_count_elsewhere():
    assert class_probabilities(Fixed(), [batch(0.0)], ["organ"])["organ"][1] is None


def test_voxels_that_may_be_of_a_class_do_not_count_elsewhere():
    one = batch()
    # 3: of two labels the first, or the second that lies in it
    left_open = Batch(one.image, torch.where(one.target == 1, 3, 0), one.weight, one.unlabelled, one.weak)
    found = class_probabilities(Fixed(), [left_open], ["organ", "lesion"])
    assert found["organ"] == [None, pytest.approx(0.1)]
    assert found["lesion"] == [None, pytest.approx(0.45)]


def test_what_is_not_learned_is_said():
    classes = {"fine": [0.9, 0.02], "low": [0.066, 0.01], "everywhere": [0.5, 0.4], "absent": [None, 0.1]}
    assert not_learned(classes) == ["low", "everywhere"]
    low, everywhere = warnings_of(classes)
    assert low.startswith("low is not learned: its mean probability is 0.066 on its own voxels and 0.010 elsewhere")
    assert everywhere.startswith("everywhere is not learned")
    assert described(classes).startswith("; fine 0.90 on its voxels, 0.020 elsewhere; low 0.07")
    assert "absent - on its voxels" in described(classes)
