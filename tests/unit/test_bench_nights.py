"""benchmarks/bench_nights.py on the smallest phantoms: two nights with humans, aliens, a weak start, and a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.rounds.ledger import Ledger
from aslseg.ssl import engine
from tiny_rounds import SHAPE, tiny_settings

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_nights

    monkeypatch.setattr(bench_nights, "HELD_OUT", 2)
    monkeypatch.setattr(bench_nights, "SHAPE", SHAPE)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    monkeypatch.setattr(engine, "CLASS_BATCHES", 1)
    return bench_nights


def test_two_nights_and_a_kill_between_them(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings(tmp_path, labels="liver", nested="", promote_fraction=0.5)
    plan = bench.Plan(nights=1, labels=2, pool=9, first=2, weak=True, aliens=0.15, poison=0.15)
    out = tmp_path / "week"
    source = bench.phantoms(plan.seed)
    label = bench.Week.label

    def killed(self: Any, strategy: str, case: str) -> None:
        label(self, strategy, case)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bench.Week, "label", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.simulate(out, plan, settings, source)
    rows = bench.simulate(out, replace(plan, nights=2), settings, source)
    ledger = Ledger(out / "studies" / ".aslseg" / "ledger.sqlite")
    assert [r.state for r in ledger.rounds()] == ["done", "done"], "the first round was not run again"
    assert [r["labels"] for r in rows] == [4, 6]
    assert [r["new_labels"] for r in rows] == [2, 2]
    assert len(ledger.events(kinds=("saved",))) == 4
    assert len(ledger.events(kinds=("compared",))) == 2, "those of the first day"
    assert all("handed_out" in e.details for e in ledger.events(kinds=("saved",)))
    strange = json.loads((out / "strange.json").read_text())
    assert sorted(strange.values()) == ["mr", "poisoned"]
    (mr,) = [case for case, kind in strange.items() if kind == "mr"]
    assert mr not in {e.case for e in ledger.events(kinds=("saved",))}, "nobody labels what is no abdomen"
    assert all(0 <= r["held_out"] <= 1 and 0 <= r["fresh"] <= 1 for r in rows)
    table = (out / "table.md").read_text()
    assert table.count("\n") == 4
    assert "| 2 | 6 (0) |" in table
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(rows))


def test_a_bad_label_and_every_alien_differ_from_the_scan(bench: Any) -> None:
    from alien_scans import ALIENS, alien, poisoned

    _, scan, label = bench.phantoms(0)(0)
    bad = bench.bad_label(label)
    assert 0 < bad.sum() < 0.6 * label.sum()
    for kind in ALIENS:
        made = alien(kind, scan, label, 1)
        assert made.array.shape == scan.array.shape
        assert np.isfinite(made.array).all()
        assert np.abs(made.array - scan.array).mean() > 5, kind
        np.testing.assert_array_equal(made.array, alien(kind, scan, label, 1).array)
    assert (poisoned(scan, label, 1).array != scan.array).mean() > 0.01
