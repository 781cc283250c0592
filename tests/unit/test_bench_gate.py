"""benchmarks/bench_gate.py: thirty nights by the gate's own rules, and what is stated of the model at their end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_gate

    return bench_gate


def test_what_is_stated_after_thirty_nights_is_unbiased(bench: Any) -> None:
    excess = {}
    for name in ("before", "now"):
        worlds = [bench.World(np.random.default_rng([1, n])) for n in range(200)]
        found = np.array([bench.growing(world, 30, 0.0, name) for world in worlds])
        excess[name] = float((found[:, 2] - found[:, 1]).mean())
    assert excess["before"] > 0.05, "a reused judge"
    # 200 folders, each with a standard deviation of 0.03
    assert abs(excess["now"]) < 0.01


def test_tables(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "tables.md"
    monkeypatch.setattr(sys, "argv", ["bench_gate.py", "--runs", "100", "--nights", "5", "--out", str(out)])
    bench.main()
    text = out.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 5 + 1 + 6 + 1 + 15 + 1 + 4
    one_label = next(row for row in rows if row.startswith("| 1 | "))
    assert one_label.split(" | ")[4:7] == ["0", "0", "0"], "one label never shows that other masks help"
