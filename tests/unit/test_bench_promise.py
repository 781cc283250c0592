"""The promise holds as often as it says, over nights that a test can afford; docs/lab has a thousand of each."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_promise as bench


def outcome(make: bench.Maker, rule: bench.Rule, studies: int = 25, length: int = 12) -> tuple[float, float]:
    """Share of the promises that is broken, and of the oracle's masks that is promoted."""
    each = [make(np.random.default_rng([5, n])) for n in range(studies)]
    found = np.array([night for study in each for night in bench.nights(study, rule, length, bench.TARGET)])
    made = found[:, 1] > 0
    return found[made, 3].mean(), found[:, 1].sum() / found[:, 2].sum()


@pytest.mark.parametrize("r", [0.9, 0.8, 0.7])
def test_drift_breaks_at_most_one_promise_in_ten(r: float) -> None:
    scenario = bench.Scenario("", r, drift=True)
    broken, share = outcome(lambda generator: bench.Simulated(scenario, generator), bench.product)
    assert broken <= 0.1
    assert share > 0.2, "it does promise"


def test_shared_mistakes_break_half_as_many_promises_as_without_an_allowance_for_them() -> None:
    scenario = bench.Scenario("", 0.9, mistakes=0.05)
    ours, plain = (
        outcome(lambda generator: bench.Simulated(scenario, generator), rule)[0]
        for rule in (bench.product, bench.plain)
    )
    assert ours < 0.67 * plain


def test_real_pairs_are_read_and_drawn_from(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = "\n".join(f"la,{n},{0.7 + 0.01 * n},{0.6 + 0.012 * n}" for n in range(20))
    path.write_text(f"set,case,agreement,dice\n{rows}\n")
    pairs = bench.read_pairs(path)
    assert pairs["la"].shape == (20, 2)
    study = bench.Resampled(pairs["la"], False, np.random.default_rng(0))
    agreement, dice = study.draw(50, 1)
    assert set(np.round(dice, 6)) <= set(np.round(pairs["la"][:, 1], 6))
    assert agreement == pytest.approx(0.7 + (dice - 0.6) / 1.2)
    lines = list(bench.table(pairs, 2, 4, 0, 0.7))
    assert len(lines) == 2 + 2 * 2, "with and without drift, both rules"
