from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aslseg.sam.clicks.slice_mask import IntensityStats
from aslseg.sam.clicks.stop_rules import (
    COMPONENT_RULES,
    SLICE_RULES,
    GrownComponent,
    GrownSlice,
    StopReason,
    StopRules,
    agree,
    first_reason,
)
from aslseg.settings import Settings


def square(low: int, high: int, size: int = 20) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[low:high, low:high] = True
    return mask


LIMITS = StopRules()
COMPONENT = GrownComponent(square(5, 15), square(4, 14), 0.9)
SLICE = GrownSlice(
    mask=square(5, 15),
    before=square(5, 15),
    scale=1.0,
    intensities=lambda: np.full(100, 0.5),
    clicked=IntensityStats(0.52, 0.05),
    shown=square(5, 15),
)


def test_what_lies_mostly_in_a_component_that_stays_ends_there() -> None:
    half = replace(SLICE, staying=square(5, 15) & (np.arange(20) < 10))
    assert first_reason(SLICE_RULES, half, LIMITS) is None
    assert first_reason(SLICE_RULES, replace(SLICE, staying=square(5, 14)), LIMITS) is StopReason.MET_AUTOMATIC


def test_the_limits_come_from_the_settings() -> None:
    assert StopRules.from_settings(Settings()) == StopRules()
    assert StopRules.from_settings(Settings(min_component=4)).min_area == 4


def test_what_follows_the_slice_before_goes_on() -> None:
    assert first_reason(COMPONENT_RULES, COMPONENT, LIMITS) is None
    assert first_reason(SLICE_RULES, SLICE, LIMITS) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"predicted_iou": 0.49}, StopReason.PREDICTED_IOU),
        ({"predicted_iou": 0.5}, None),
        ({"mask": square(13, 20)}, StopReason.NO_OVERLAP),
        ({"mask": square(0, 1)}, StopReason.NO_OVERLAP),
        ({"mask": square(0, 0)}, StopReason.NO_OVERLAP),
        ({"mask": square(13, 20), "predicted_iou": 0.1}, StopReason.PREDICTED_IOU),
    ],
)
def test_reasons_to_reject_a_component(change: dict, reason: StopReason | None) -> None:
    assert first_reason(COMPONENT_RULES, replace(COMPONENT, **change), LIMITS) is reason


def test_a_component_is_compared_with_those_that_it_touches_alone() -> None:
    before = square(4, 14)
    before[17:, :] = True  # another component, of 60 pixels
    assert first_reason(COMPONENT_RULES, replace(COMPONENT, before=before), StopRules(overlap=0.8)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": square(5, 5)}, StopReason.NOTHING_LEFT),
        ({"mask": square(5, 7), "before": square(5, 7)}, StopReason.NOTHING_LEFT),
        ({"mask": square(5, 7), "before": square(5, 7), "scale": 2.0}, None),
        ({"before": square(5, 12)}, StopReason.AREA),
        ({"before": square(5, 13)}, None),
        ({"intensities": lambda: np.full(100, 0.7)}, StopReason.INTENSITY),
        ({"automatic": square(5, 15)}, StopReason.AGREES),
        ({"automatic": square(5, 14)}, None),
    ],
)
def test_reasons_to_end_at_a_slice(change: dict, reason: StopReason | None) -> None:
    assert first_reason(SLICE_RULES, replace(SLICE, **change), LIMITS) is reason


def test_another_limit_changes_the_verdict() -> None:
    assert first_reason(SLICE_RULES, replace(SLICE, before=square(5, 12)), StopRules(area_ratio=3)) is None
    bright = replace(SLICE, intensities=lambda: np.full(100, 0.7))
    assert first_reason(SLICE_RULES, bright, StopRules(intensity=5)) is None


def test_an_object_without_texture_may_vary_a_little() -> None:
    assert IntensityStats.of(np.full(9, 0.5)).matches(np.full(9, 0.53), 2)
    assert not IntensityStats.of(np.full(9, 0.5)).matches(np.full(9, 0.55), 2)
    assert not IntensityStats.of(np.zeros(0)).matches(np.full(9, 0.5), 2)
    assert not IntensityStats.of(np.full(9, 0.5)).matches(np.zeros(0), 2)


def test_two_empty_masks_agree() -> None:
    assert agree(square(0, 0), square(0, 0), 1)
    assert not agree(square(0, 0), square(0, 1), 0.1)
