"""Promoted masks as a group against the human labels: nothing is said without drift, and drift is said with numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.rounds.promotion.drift import LEVEL, compare_groups, features, find_drift, in_words
from aslseg.types import Labels

LABELS = Labels.of(["liver", "tumour"], [("tumour", "liver")])


def group(rng: np.random.Generator, count: int, factor: float = 1, darker: float = 0) -> list[dict[str, Any]]:
    """Features of livers, volumes log-normal and intensities normal, as patients have them."""
    return [
        {"liver": {"volume": factor * 1500 * np.exp(rng.normal(0, 0.25)), "intensity": rng.normal(0.6, 0.05) - darker}}
        for _ in range(count)
    ]


def warned(seed: int, labels: int, promoted: int, **drift: float) -> bool:
    rng = np.random.default_rng(seed)
    return bool(in_words(compare_groups(group(rng, labels), group(rng, promoted, **drift))))


def test_false_alarms_are_as_rare_as_is_said() -> None:
    alarms = [warned(seed, labels, 12) for seed in range(500) for labels in (4, 8)]
    assert np.mean(alarms) <= 1.5 * LEVEL


@pytest.mark.parametrize("drift", [{"factor": 0.5}, {"factor": 2.0}, {"darker": 0.15}])
def test_drift_is_seen(drift: dict[str, float]) -> None:
    assert np.mean([warned(seed, 8, 12, **drift) for seed in range(40)]) >= 0.8


def test_one_strange_mask_is_no_drift() -> None:
    rng = np.random.default_rng(0)
    promoted = [*group(rng, 11), {"liver": {"volume": 1e6, "intensity": 1.0}}]
    assert in_words(compare_groups(group(rng, 8), promoted)) == []


def test_too_few_to_compare() -> None:
    rng = np.random.default_rng(0)
    assert compare_groups(group(rng, 3), group(rng, 20, factor=100)) == {}
    assert compare_groups(group(rng, 20), group(rng, 3, factor=100)) == {}
    assert compare_groups([], []) == {}


def case(label: np.ndarray, image: float) -> Any:
    return SimpleNamespace(
        label=label, image=np.full(label.shape, image, np.float32), grid=SimpleNamespace(spacing=(10, 10, 5))
    )


def test_a_label_holds_what_is_nested_in_it_and_an_empty_one_has_no_features() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[:2] = 1
    assert features(case(label, 0.5), LABELS) == {"liver": {"volume": 16.0, "intensity": 0.5}}
    label[0, 0, 0] = 2
    found = features(case(label, 0.5), LABELS)
    assert found["liver"]["volume"] == 16
    assert found["tumour"]["volume"] == 0.5


def test_a_warning_of_the_round_has_the_numbers() -> None:
    human, promoted = np.zeros((8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.uint8)
    human[:4], promoted[:2] = 1, 1
    groups = [[case(m, 0.5 + 0.001 * n) for n in range(12)] for m in (human, promoted)]
    cases = SimpleNamespace(train=groups[0][:6], validation=groups[0][6:], warnings=["before"])
    pipeline: Any = SimpleNamespace(cases=cases, labels=LABELS)
    chosen: Any = [SimpleNamespace(case=c) for c in groups[1]]
    found = find_drift(pipeline, chosen)
    assert found["liver"]["volume"]["drift"]
    assert not found["liver"]["intensity"]["drift"]
    before, warning = cases.warnings
    assert before == "before"
    assert "the volume of liver in the 12 promoted masks is unlike that of 12 human labels" in warning
    assert "median 64 against 128 ml" in warning


def test_what_a_promoted_mask_leaves_open_counts_for_the_label_around_it() -> None:
    whole = np.zeros((4, 4, 4), np.uint8)
    whole[:2], whole[0, 0, 0] = 1, 2
    promoted = LABELS.mark_unknown(whole, ["tumour"])
    assert features(case(promoted, 0.5), LABELS) == {"liver": {"volume": 16.0, "intensity": 0.5}}
