"""benchmarks/promise_limits.py: what is assumed of the simulated nights is what is drawn, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import promise_limits

    monkeypatch.setattr(promise_limits, "DRAWS", 200)
    monkeypatch.setattr(promise_limits, "KEPT", 100)
    return promise_limits


@pytest.mark.parametrize("drift", [False, True])
def test_who_knows_f_is_right_as_often_as_it_thinks(limits: Any, drift: bool) -> None:
    """Mean Dice of 30 scans, by the probability and by drawing them again and again."""
    scenario = limits.Scenario("test", 0.8, 0.02, drift)
    study = limits.Simulated(scenario, np.random.default_rng(3))
    study.mean = 0.85 + 0.03 * drift
    here, night = limits.truth(study, 12), 12
    thought, right = [], []
    for _ in range(300):
        study.better = float(here.better[0, -1])
        agreement, dice = study.draw(30, night)
        order = np.argsort(-agreement)
        found = limits.chances(here, limits.logs(agreement[order]), night, 0.8, here.rate)[0]
        thought.append(found)
        right.append(np.cumsum(dice[order]) / np.arange(1, 31) >= limits.TARGET)
    assert np.mean(thought, 0) == pytest.approx(np.mean(right, 0), abs=0.08)
    assert 0.1 < np.mean(right) < 0.9, "else it says nothing"


def test_what_was_seen_outweighs_the_prior(limits: Any) -> None:
    rng, rate = np.random.default_rng(0), np.zeros(200)
    known = limits.prior(rng, 200, 0.0, 5)
    study = limits.Simulated(limits.Scenario("test", 0.9), np.random.default_rng(1))
    agreement, dice = study.draw(200, 1)
    weight = limits.log_likelihood(known, limits.logs(agreement), dice, 1, 0.9, rate)
    best = int(weight.argmax())
    assert known.mean[best] == pytest.approx(study.mean, abs=0.01)
    assert known.width[best] == pytest.approx(study.width, abs=0.01)


def test_the_table_has_a_line_for_each_rule(limits: Any) -> None:
    lines = list(limits.table(limits.Scenario("test", 0.9), studies=1, length=4, seed=1))
    assert [line.split(" | ")[1] for line in lines] == list(limits.RULES)
