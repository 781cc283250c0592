"""What is asked of a new model, by number of labels and by what has changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from aslseg.models.gate_rules import least_since_first, shown_better, shown_not_below, shown_worse

SPREAD = 0.044  # of the difference of two models' Dice on one case: 0.07 a case, four fifths of the variance common


def rate(rule, true: float, labels: int, runs: int = 4000) -> float:
    rng = np.random.default_rng(labels)
    return sum(rule(rng.normal(true, SPREAD, labels)) for _ in range(runs)) / runs


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_labels_never_show_that_masks_help(count: int) -> None:
    assert not shown_better([0.5] * count)


def test_the_gain_that_is_asked_falls_with_the_number_of_labels() -> None:
    assert shown_better([0.008, 0.008, 0.0081])
    assert not shown_better([0.007] * 3)
    assert shown_better([0.0031] * 8)
    assert not shown_better([0.0029] * 8)
    assert not shown_better([0.1, math.nan, 0.1])


@pytest.mark.parametrize(("labels", "most"), [(3, 0.16), (4, 0.15), (8, 0.09), (16, 0.04)])
def test_a_model_that_other_masks_made_worse_is_rarely_published(labels: int, most: float) -> None:
    assert rate(shown_better, -0.02, labels) < most
    before = rate(lambda d: np.mean(d) >= 0, -0.02, labels)
    assert rate(shown_better, -0.02, labels) < before
    assert rate(shown_better, 0.02, labels) > 0.6


def test_a_candidate_is_held_against_the_first_model_by_a_t_test_whose_level_falls_with_the_tries() -> None:
    differences = [0.01, 0.02, 0.03, 0.06]
    found = stats.ttest_1samp(differences, 0).confidence_interval(0.98)
    half = 0.03 - found.low
    assert least_since_first(differences, 1) == pytest.approx(half - 0.005)
    assert least_since_first(differences, 10) > least_since_first(differences, 1)
    assert shown_not_below([0.02, 0.021, 0.022], 1)
    assert not shown_not_below([0.02, 0.021, 0.022], 100)
    assert not shown_not_below([-0.006] * 8, 1)
    assert shown_not_below([-0.004] * 8, 1)
    assert not shown_not_below([0.5, 0.5], 1)
    assert not shown_not_below([0.1, math.nan, 0.1], 1)


@pytest.mark.parametrize("labels", [1, 2, 4, 8, 16])
def test_with_new_labels_a_model_that_is_as_good_is_published_nine_times_in_ten(labels: int) -> None:
    assert rate(shown_worse, 0.0, labels) < 0.115
    assert rate(shown_worse, 0.02, labels) < 0.03


def test_what_is_clearly_worse_is_shown_by_one_label() -> None:
    assert not shown_worse([])
    assert not shown_worse([-0.07])
    assert shown_worse([-0.08])
    # by t's test without what is known before, two equal differences would show anything
    assert not shown_worse([-0.01, -0.01])
    assert shown_worse([-0.06, -0.05])
    assert not shown_worse([-0.3, 0.3])
    assert shown_worse([math.nan])
    assert rate(shown_worse, -0.05, 8) > 0.95
