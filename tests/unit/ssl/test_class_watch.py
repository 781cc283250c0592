"""The monitor of each class: probabilities on its own voxels and elsewhere, and what counts as not learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.hardware import resolved
from aslseg.settings import Settings
from aslseg.ssl.batches import Batches
from aslseg.ssl.class_watch import class_probabilities, described, not_learned, warnings_of
from aslseg.ssl.methods.base import Batch
from aslseg.types import Volume
from aslseg.volume.geometry import Grid


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


def scan(name: str, *values: int) -> Prepared:
    """A scan with a cube of each of some classes."""
    label = np.zeros((40, 40, 40), np.uint8)
    for n, value in enumerate(values):
        label[8 * n : 8 * n + 8, :8, :8] = value
    image = label.astype(np.float32) / 10
    return Prepared(name, name, image, Grid.of(Volume(image, np.eye(4)), None), label=label)


@pytest.mark.parametrize("each", [1, 4])
def test_each_class_that_any_of_many_labels_shows_is_watched(each: int) -> None:
    settings = resolved(Settings(labels="a,b,c,d,e", nested="", batch_labelled=each, device="cpu"))
    scans = [*(scan(str(n), 1) for n in range(30)), scan("other", 1, 2, 3, 4)]
    batches = Batches(scans, [], settings, (16, 16, 16), torch.device("cpu"))
    watched = list(batches.watched(7, 1))
    assert {b.image.shape[0] for b in watched} == {each}
    seen = class_probabilities(Fixed6(), watched, settings.label_set.names)
    assert {name for name, (own, _) in seen.items() if own is not None} == {"a", "b", "c", "d"}
    again = batches.watched(7, 1)
    assert all(torch.equal(one.image, two.image) for one, two in zip(watched, again, strict=True))
    assert len(list(batches.watched(7, 8))) == 8


class Fixed6(nn.Module):
    """Gives six classes the same probability."""

    def forward(self, x):
        return torch.zeros(len(x), 6, *x.shape[2:])
