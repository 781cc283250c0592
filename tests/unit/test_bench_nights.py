"""benchmarks/bench_nights.py on the smallest phantoms: two nights with humans, aliens, a weak start, and a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.rounds.ledger.ledger import Ledger
from tiny_rounds import tiny_settings


@pytest.fixture
def bench(short_nights: Any) -> Any:
    return short_nights


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
    assert json.loads((out / "nights.json").read_text()) == json.loads(json.dumps(rows))
    assert rows[0]["stages"].keys() >= {"ssl", "predict", "promote"}

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a night that is done is not computed again")

    monkeypatch.setattr(bench, "run_round", never)
    assert bench.simulate(out, replace(plan, nights=2), settings, source) == json.loads(json.dumps(rows))
    with pytest.raises(ValueError, match="name another --out, or delete it"):
        bench.simulate(out, replace(plan, nights=2, pool=10), settings, source)


@pytest.mark.parametrize("edge", [2, 3])
def test_atria_are_built_once_and_then_need_no_data(bench: Any, tmp_path: Path, edge: int) -> None:
    from aslseg.volume.io import read_image, write_image, write_label
    from aslseg.volume.phantom import make_phantom

    data, out, plan = tmp_path / "la", tmp_path / "out", bench.Plan(pool=3, first=1, edge=edge)
    names = [f"N{n}" for n in range(5)]
    for n, name in enumerate(names):
        scan, label = make_phantom(1, n, shape=(24, 24, 12))
        write_image(data / "images" / f"{name}.nii.gz", scan)
        write_label(data / "labels" / f"{name}.nii.gz", (label > 0).astype(np.uint8), scan.affine)
    (data / "train.txt").write_text("\n".join(names))
    bench.build(out, plan, bench.atria(data, edge))
    assert len(list((out / "studies").glob("*.nii.gz"))) == 3
    assert len(list((out / "heldout").glob("*.nii.gz"))) == 2
    whole, small = read_image(data / "images" / "N1.nii.gz"), read_image(out / "studies" / "scan_001.nii.gz")
    assert small.array.shape == (24 // edge, 24 // edge, 12 // edge)
    expected = whole.array[:edge, :edge, :edge].mean()
    assert abs(float(small.array[0, 0, 0]) - expected) <= 0.5, "the mean of the first cube, rounded"
    np.testing.assert_allclose(np.diag(small.affine)[:3], edge * np.diag(whole.affine)[:3])
    bench.build(out, plan, bench.atria(tmp_path / "nowhere", edge))
    with pytest.raises(ValueError, match="was made with"):
        bench.build(out, replace(plan, edge=5 - edge), bench.atria(data, edge))


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
