"""Scores, table and runs of benchmarks/bench_lits.py and realdata_lits.py, on small made-up livers."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.weights import load_weights, save_weights
from aslseg.ssl import engine
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.io import write_image, write_label
from aslseg.volume.phantom import make_phantom
from tiny_rounds import tiny_sam

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_lits
    import lits_plan
    import lits_scoring
    import lits_split
    import realdata_lits

    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 1)
    monkeypatch.setattr(engine, "CLASS_BATCHES", 1)
    return Namespace(lits=bench_lits, split=lits_split, scoring=lits_scoring, stages=realdata_lits, plan=lits_plan)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four patients, one of them with two scans and one healthy."""
    rows = ["case,patient,tumour_ml"]
    for n, (patient, ml) in enumerate([("a", 9.0), ("b", 5.0), ("c", 2.0), ("d", 0.0), ("a", 8.0)]):
        volume, label = make_phantom(1, n, shape=(24, 24, 8))
        name = f"lits_{n:03d}"
        write_image(tmp_path / "images" / f"{name}.nii.gz", volume)
        write_label(tmp_path / "labels" / f"{name}.nii.gz", label if ml else np.minimum(label, 1), volume.affine)
        rows.append(f"{name},{patient},{ml}")
    (tmp_path / "patients.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def row(case: str, patient: str, tumour: float | None, found: int = 0, false: int = 0) -> dict[str, Any]:
    lesions, ml = (0, 0.0) if tumour is None else (2, 4.0)
    score = {"dice": tumour, "lesions": lesions, "found": found, "false": false, "ml": ml}
    return {"case": case, "patient": patient, "liver": 0.9, "tumour": score | {"predicted_ml": ml + false}}


def test_means_are_over_patients_and_healthy_livers_count_apart(benches: Any) -> None:
    rows = [row("1", "p", 0.2, found=1), row("2", "p", 0.4, found=2), row("3", "q", 0.9, found=2)]
    rows.append(row("4", "healthy", None, false=2))
    found = benches.scoring.summary(rows)
    assert found["tumour"] == pytest.approx((0.3 + 0.9) / 2)
    assert found["lesion_recall"] == pytest.approx((0.75 + 1) / 2)
    assert found["false_lesions"] == pytest.approx(2 / 3)
    assert (found["false_lesions_healthy"], found["healthy_called_ill"]) == (2, 1)
    assert found["volume_error_ml"] == pytest.approx(2 / 3)
    assert benches.scoring.summary(rows[:3])["healthy_called_ill"] is None


def test_lesions_and_volumes_of_a_mask(benches: Any) -> None:
    true, mask = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
    true[1:3, 1:3, 1:3] = True
    mask[1:3, 1:3, 1:4] = True
    mask[7, 7, 7] = True
    found = benches.scoring.lesion_score(mask, true, 0.5)
    assert found == {"dice": pytest.approx(16 / 21), "lesions": 1, "found": 1, "false": 1, "ml": 4, "predicted_ml": 6.5}


def test_folds_deal_out_patients_by_the_size_of_their_tumour(benches: Any, data: Path) -> None:
    parts = [benches.scoring.fold_patients(n, 2, data) for n in (1, 2)]
    assert parts == [{"a", "c"}, {"b", "d"}]


def test_the_table_has_a_row_for_each_arm_with_the_spread_over_its_runs(
    benches: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benches.scoring, "ROTATIONS", ((0,), (1,)))
    common = {"seed": 1, "steps": 7, "fold": None}
    results = [common | {"arm": "some", "rows": [row("x", "b", tumour)]} for tumour in (0.2, 0.4)]
    full = {"arm": "full", "seed": 1, "steps": 7}
    results.append(full | {"fold": "1/2", "rows": [row("x", "a", 0.5), row("y", "c", 0.7)]})
    results.append(full | {"fold": "2/2", "rows": [row("z", "b", 0.3), row("u", "d", None)]})
    lines = benches.scoring.table(results, data).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| some | 2 | 7 | 0.900 ± 0.000 | 0.300 ± 0.141 |")
    # without a, and without b: what the rotations would have held out
    assert lines[3].startswith("| full | 2 | 7 | 0.900 ± 0.000 | 0.550 ± 0.071 |")


def test_what_is_said_of_tumours(benches: Any) -> None:
    label = np.array([[[0, 1, 2]]], np.uint8)
    case = Prepared("a", "a", label.astype(np.float32), Grid.of(Volume(label, np.eye(4)), None), label)
    assert benches.split.taught(case, "labelled") is case
    liver = benches.split.taught(case, "liver")
    assert liver.label.ravel().tolist() == [0, 1, 1]
    assert liver.voxel_weight is None
    unknown = benches.split.taught(case, "unknown")
    assert unknown.label.ravel().tolist() == [0, 1, 1]
    assert unknown.voxel_weight.ravel().tolist() == [1, 1, 0]


def arguments(tmp_path: Path, data: Path, out: str) -> list[str]:
    conf = {"network": "unet", "patch": "32,32,16", "overlap": 0, "batch_labelled": 1, "batch_unlabelled": 1}
    conf |= {"sam_iterations": 1, "sam_batch": 1, "adapter_iterations": 1, "min_component": 0, "threads": 1}
    conf |= {"sam_checkpoint": tiny_sam(tmp_path / "sam.safetensors")}
    given = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / out), "--steps", "2"]
    return [*given, *(part for key, value in conf.items() for part in ("--conf", f"{key}={value}"))]


def test_stages_apart_are_trained_and_joined(
    benches: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what, more in {
        "first": ["--train-only"],
        "second": ["--crossfit", "2", "--tumours", "labelled"],
        "joined": ["--first", str(tmp_path / "first"), "--second", str(tmp_path / "second")],
    }.items():
        monkeypatch.setattr(sys, "argv", ["bench", what, *arguments(tmp_path, data, what), "--fold", "2/2", *more])
        path = tmp_path / "second" / "second.safetensors"
        if what == "joined":
            # limits of the second stage alone
            state, metadata = load_weights(path, "ssl")
            save_weights(path, state, metadata | {"specks": {"tumour": {"probability": 1.0, "mm3": 1e9}}})
        benches.lits.main()
    assert not (tmp_path / "first" / "result.json").exists()
    assert {p.name for p in (tmp_path / "second").glob("fold-*")} == {"fold-0.safetensors", "fold-1.safetensors"}
    result = json.loads((tmp_path / "joined" / "result.json").read_text())
    assert [r["patient"] for r in result["rows"]] == ["b", "d"]
    assert result["arm"] == "full supervision, supervised"
    assert result["steps"] == 4
    assert result["limits"] == {}
    assert not list((tmp_path / "joined").glob("*.npz"))
    assert (tmp_path / "joined" / "outlines.png").exists()
    # a second stage trained apart with unlabelled scans has seen their true livers
    state, metadata = load_weights(path, "ssl")
    save_weights(path, state, metadata | {"method": "bcp_mt"})
    with pytest.raises(SystemExit, match="true livers of unlabelled scans"):
        benches.lits.main()


def test_every_stage_is_scored_on_patients_that_none_has_seen(
    benches: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["real", *arguments(tmp_path, data, "real"), "--fold", "2/2", "--crossfit", "2"])
    seen: list[set[str]] = []
    for module in (benches.stages.training, benches.stages.finetune, benches.stages.adapter_train):
        train = module.train

        def watched(labelled: Any, *rest: Any, call: Any = train, **more: Any) -> Any:
            seen.append({c.patient for c in labelled})
            return call(labelled, *rest, **more)

        monkeypatch.setattr(module, "train", watched)
    benches.stages.main()
    assert len(seen) == 5
    assert set().union(*seen) == {"a", "c"}
    for stage in ("ssl", "sam", "adapter"):
        result = json.loads((tmp_path / "real" / stage / "result.json").read_text())
        assert [r["patient"] for r in result["rows"]] == ["b", "d"]
        assert result["arm"] == f"full supervision, bcp_mt, {stage}"


def test_runs_of_a_plan(benches: Any) -> None:
    found = benches.plan.runs(["8", "4-liver", "full"], ["1", "2"], ["7"])
    assert len(found) == 2 + 2 + benches.plan.FOLDS
    assert found[0].split == ("--rotation", "1", "--labelled", "8", "--conf", "seed=7")
    assert found[2].extra == ("--tumours", "liver")
    assert found[2].first == "first-4-1-s7"
    assert len({run.name for run in found}) == len(found)
    with pytest.raises(ValueError, match="8-livers"):
        benches.plan.runs(["8-livers"], ["1"], ["7"])
