"""Schedules and the running average against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from torch import nn

from aslseg.compute.schedules import ema_update, polynomial, sigmoid_ramp
from aslseg.registry import SSL_METHODS
from aslseg.settings import load_settings
from aslseg.ssl.networks import VNet


def test_ramps():
    assert sigmoid_ramp(0) == sigmoid_ramp(-1) == pytest.approx(math.exp(-5))
    assert sigmoid_ramp(0.5) == pytest.approx(math.exp(-1.25))
    assert sigmoid_ramp(1) == sigmoid_ramp(7) == 1
    assert polynomial(0) == 1
    assert polynomial(1) == polynomial(2) == 0
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
    assert student.weight.item() == 5.0


def test_ema_leaves_batch_statistics_to_the_teacher():
    teacher, student = nn.BatchNorm3d(1), nn.BatchNorm3d(1)
    student.running_mean.fill_(7.0)
    student.weight.data.fill_(3.0)
    ema_update(teacher, student, step=1, decay=0.99)
    assert teacher.weight.item() == 2.0
    assert teacher.running_mean.item() == 0.0


@pytest.mark.parametrize(
    ("method", "published"),
    [("mean_teacher", 0.1), ("ua_mt", 0.1), ("cps", 0.1), ("dtc", 1.0), ("mcnet", 1.0)],
)
def test_consistency_weight_is_the_published_one_unless_set(method, published):
    def weight(part: float, **conf: str) -> float:
        settings = load_settings({"ssl_method": method, **conf}, env={})[0]
        return SSL_METHODS.get(method)(lambda extra=0: VNet(3 + extra, filters=1), settings).consistency_weight(part)

    assert weight(1.0) == published
    assert weight(0.5) == pytest.approx(published * math.exp(-1.25))
    assert weight(1.0, consistency="0.7") == 0.7
    assert weight(0.0, consistency="0") == 0


@pytest.mark.parametrize("method", ["supervised", "bcp", "bcp_mt"])
def test_methods_whose_loss_has_no_consistency_say_so(method):
    settings = load_settings({"ssl_method": method, "consistency": "0.7"}, env={})[0]
    assert SSL_METHODS.get(method)(lambda extra=0: VNet(3 + extra, filters=1), settings).consistency_weight(1.0) == 0
