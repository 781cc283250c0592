"""benchmarks/bench_loop.py on small made-up atria: what each arm learns from, the tables, and several processes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from aslseg.ssl import engine
from aslseg.types import Volume
from aslseg.volume.io import read_image, write_image, write_label
from own_thread import for_this_thread
from tiny_rounds import tiny_sam

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = [f"case{n}" for n in range(8)]  # six to train on, two of them labelled, one to choose by, one held out
CONF = ["--conf", "patch=32,32,16", "--conf", "network=unet", "--conf", "threads=1", "--steps", "4"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_loop
    import loop_data
    import loop_table

    monkeypatch.setattr(loop_data, "TRAINED", 6)
    monkeypatch.setattr(bench_loop, "WAIT", 0.01)
    monkeypatch.setattr(loop_table, "CHOSEN_BY", 1)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    monkeypatch.setattr(engine, "CLASS_BATCHES", 1)
    return bench_loop


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Scans of 60 x 60 x 30 voxels with a bright cube."""
    rng = np.random.default_rng(0)
    for n, name in enumerate(NAMES):
        label = np.zeros((60, 60, 30), np.uint8)
        label[15 + n : 45, 15:45, 6:24] = 1
        image = 60 + 90 * label + rng.normal(0, 15, label.shape)
        write_image(tmp_path / "images" / f"{name}.nii.gz", Volume(image.astype(np.float32), np.diag([-1.0, 1, 1, 1])))
        write_label(tmp_path / "labels" / f"{name}.nii.gz", label, np.diag([-1.0, 1, 1, 1]))
    (tmp_path / "train.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], dict[str, Any]]]:
    """The labelled cases, and the settings by name, of each training."""
    seen: list[tuple[list[Any], dict[str, Any]]] = []
    train = engine.train

    def watched(labelled: list[Any], free: Any, settings: Any, out: Path, **more: Any) -> Any:
        seen.append((labelled, more | {"seed": settings.seed, "method": settings.ssl_method}))
        return train(labelled, free, settings, out, **more)

    monkeypatch.setattr(engine, "train", watched)
    return seen


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_loop.py", "--labelled", "2", *CONF, *arguments])
    bench.main()


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/result.json"))}


def test_arms_learn_what_they_say_and_are_computed_once(
    bench: Any, data: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = data / "out"
    arms = ["student", "today", "true labels", "distilled"]
    run(bench, monkeypatch, "--data", str(data), "--out", str(out), "--sets", "2", "--arms", ",".join(arms))

    # what an arm needs is computed first: the masks of ssl, agreement of ssl and supervised, the folds of the ensemble
    made = results(out / "edge3_labels2" / "set2")
    assert set(made) == {"supervised", "ssl", "fold 1", "fold 2", "ensemble", *arms}
    assert all(list(r["dice"]) == ["case6", "case7"] for r in made.values())
    assert {learned["seed"] for _, learned in trained} == {1338}
    ssl, student, supervised, today, true, fold1, fold2, distilled = (cases for cases, _ in trained)
    assert [[c.id for c in cases] for cases in (ssl, supervised)] == [["case2", "case3"]] * 2
    assert [[c.id for c in cases] for cases in (fold1, fold2)] == [["case3"], ["case2"]]
    assert sorted(c.id for c in student[2:]) == ["case0", "case1", "case4", "case5"]
    assert [len(today), len(distilled)] == [2 + 2, 2 + 4]
    starts = [more["init"] for _, more in trained]
    assert [n for n, start in enumerate(starts) if start] == [3]
    assert starts[3] == out / "edge3_labels2" / "set2" / "ssl" / "ssl.safetensors"
    with np.load(out / "edge3_labels2" / "set2" / "ssl" / "maps.npz") as maps:
        p = {name: maps[name][0].astype(np.float32) for name in maps.files}
    for case in student[2:]:
        np.testing.assert_array_equal(case.label, p[case.id] >= 0.5)
        weights = np.maximum(0.1, np.abs(2 * p[case.id] - 1))
        np.testing.assert_allclose(case.voxel_weight.astype(np.float32), weights, atol=1e-3)
    assert set(np.unique(np.round(today[2].voxel_weight.astype(float), 2))) <= {0.3, 1.0}
    assert all((c.label == 1).any() and (c.voxel_weight == 1).all() for c in true[2:])
    assert set(made["true labels"]["learned"].values()) == {1.0}
    assert set(made["today"]["agreement"]) == {"case0", "case1", "case4", "case5"}
    # two folds as long as the SSL model; the distilled one is as long as the retraining and the second network
    assert {n: made[n]["units"] for n in ("ssl", "student", "today", "ensemble", "distilled")} == {
        "ssl": 1,
        "student": 2,
        "today": 2.75,
        "ensemble": 3,
        "distilled": 4.75,
    }

    # a run that was killed before it had scored an arm trains nothing again
    (out / "edge3_labels2" / "set2" / "student" / "result.json").unlink()
    monkeypatch.setattr(engine.Trainer, "step", lambda *_: pytest.fail("trained again"))
    run(bench, monkeypatch, "--data", str(data), "--out", str(out), "--sets", "2", "--arms", ",".join(arms))
    assert results(out / "edge3_labels2" / "set2")["student"]["dice"] == made["student"]["dice"]


def test_every_control_spends_what_the_loop_does(bench: Any, tmp_path: Path) -> None:
    for labelled, folds, loop in ((1, True, 2.75), (2, True, 4.75), (4, True, 4.75), (8, True, 4.75), (8, False, 2.75)):
        one = object.__new__(bench.Bench)
        one.arms = bench.arms(labelled, folds)
        units = {name: one.units(name) for name in one.arms}
        spent = [
            n for n in units if n.endswith(("equal compute", "for as long")) or n in ("self-training", "round cfr")
        ]
        assert {n: units[n] for n in spent} == dict.fromkeys(spent, pytest.approx(loop))
        assert max(units[n] for n in ("today", "round aslseg")) <= loop
        assert ("ensemble" in units) == (folds and labelled > 1)


def test_a_loop_without_folds_has_arms_and_results_of_its_own(
    bench: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--data", str(data), "--out", str(data / "out"), "--arms", "ssl,ssl at equal compute"]
    run(bench, monkeypatch, *given, "--conf", "label_folds=0")
    found = results(data / "out" / "edge3_labels2_nofolds" / "set1")
    assert {name: one["units"] for name, one in found.items()} == {"ssl": 1, "ssl at equal compute": 2.75}
    assert not (data / "out" / "edge3_labels2").exists()
    with pytest.raises(SystemExit, match="no such arm"):
        run(bench, monkeypatch, *given[:-1], "ensemble", "--conf", "label_folds=0")


def test_an_arm_of_another_process_is_left_to_it(bench: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process trains ssl, this one does what does not need it, then waits for its result."""
    out = data / "out" / "edge3_labels2" / "set1"
    lock = FileLock(out / "ssl" / "lock")
    (out / "ssl").mkdir(parents=True)
    lock.acquire()
    waited: list[list[str]] = []

    def other_finishes(_: float) -> None:
        waited.append(sorted(results(out)))
        lock.release()

    monkeypatch.setattr(time, "sleep", for_this_thread(other_finishes, time.sleep))
    run(bench, monkeypatch, "--data", str(data), "--out", str(data / "out"), "--arms", "student,supervised")
    assert waited == [["supervised"]]
    assert set(results(out)) == {"ssl", "student", "supervised"}


def test_reduced_scans_give_the_same_cases(bench: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = data / "small"
    run(bench, monkeypatch, "--data", str(data), "--reduce", str(small), "--edge", "2")
    assert read_image(small / "images" / "case0.nii.gz").array.shape == (30, 30, 15)
    settings = bench.load_settings(bench.ATRIA, env={})[0]
    for (_, a), (_, b) in zip(*(bench.read_atria(d, 2, settings) for d in (data, small)), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.label, b.label)
    with pytest.raises(SystemExit, match="give that as --edge"):
        next(bench.read_atria(small, 3, settings))


def test_a_round_is_an_arm(bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retrained model of a whole round is scored; a second call runs no round."""
    out = data / "out"
    # masks after four steps are specks, which SAM redraws one by one
    conf = ["--conf", "promote_floor=0", "--conf", "promote_threshold=0", "--conf", "ssl_iterations=40"]
    conf += ["--conf", f"sam_checkpoint={tiny_sam(tmp_path / 'sam.safetensors')}"]
    arguments = ["--data", str(data), "--out", str(out), "--arms", "round aslseg", *conf]
    run(bench, monkeypatch, *arguments)
    [made] = results(out / "edge3_labels2" / "set1").values()
    assert list(made["dice"]) == ["case6", "case7"]
    assert set(made["agreement"]) == {"case2", "case3", "case4", "case5"}
    assert set(made["masks"]) <= {"case2", "case3", "case4", "case5"}
    assert made["source"] in {"ssl", "adapter", "consensus", "ensemble"}
    studies = out / "edge3_labels2" / "set1" / "round aslseg" / "studies"
    assert sorted(p.name for p in (studies / "labels" / "final").iterdir()) == ["case0.nii.gz", "case1.nii.gz"]
    assert len(list(studies.glob("*.nii.gz"))) == 6

    monkeypatch.setattr("aslseg.rounds.run.run_round", lambda *_: pytest.fail("run again"))
    (out / "edge3_labels2" / "set1" / "round aslseg" / "result.json").unlink()
    run(bench, monkeypatch, *arguments)
    assert results(out / "edge3_labels2" / "set1")["round aslseg"]["dice"] == made["dice"]


def test_tables_pair_scans_over_sets_and_settings(bench: Any, tmp_path: Path) -> None:
    import loop_table

    rng = np.random.default_rng(0)
    names = [f"scan{n}" for n in range(12)]
    base = {}
    for setting in ("edge2_labels1", "edge2_labels4"):
        for number in ("set1", "set2"):
            base[setting, number] = rng.uniform(0.6, 0.8, len(names))
            arms = {"ssl at equal compute": 0.0, "self-training": 0.01, "today": 0.04, "true labels for as long": 0.08}
            for arm, gain in arms.items():
                if (setting, number, arm) == ("edge2_labels4", "set2", "today"):
                    continue  # not finished yet
                worse = 0.06 if (setting, arm) == ("edge2_labels4", "today") else 0
                dice = base[setting, number] + gain - worse
                path = (tmp_path / ("a" if number == "set1" else "b")) / setting / number / arm / "result.json"
                path.parent.mkdir(parents=True)
                result = {"dice": dict(zip(names, dice.tolist(), strict=True)), "units": 2, "unit": 600}
                path.write_text(json.dumps(result))
    text = loop_table.tables([tmp_path / "a", tmp_path / "b"])
    one, two, everything = text.split("### ")[1:]
    rows = {line.split(" | ")[0].strip("| "): line for line in one.splitlines() if line.startswith("| ")}
    assert "+0.040, p 0.00049 (2) | +0.030, p 0.00049 (2) | 50%" in rows["today"]
    assert "-0.020, p 0.00049 (1)" in two
    [today] = [line for line in everything.splitlines() if line.startswith("| today")]
    # two runs of +0.04 and one of -0.02; a scan counts once
    assert today.startswith("| today | +0.020, p 0.00049 (3) |")
    assert "-0.020 (edge2_labels4)" in today


def test_the_truth_may_choose_scans_and_voxels(
    bench: Any, data: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = data / "out"
    run(bench, monkeypatch, "--data", str(data), "--out", str(out), "--arms", "perfect selection and weights")
    made = results(out / "edge3_labels2" / "set1")["perfect selection and weights"]
    *_, (cases, _) = trained
    truth = {c.id: c.label for c in averaged(bench, data)}
    dice = {}
    with np.load(out / "edge3_labels2" / "set1" / "ssl" / "maps.npz") as maps:
        for name in ("case2", "case3", "case4", "case5"):
            mask = maps[name][0] >= 0.5
            dice[name] = 2 * (mask & (truth[name] == 1)).sum() / (mask.sum() + (truth[name] == 1).sum())
    best = sorted(dice, key=lambda name: -dice[name])[:2]
    assert set(made["learned"]) == {c.id for c in cases[2:]} == set(best)
    for case in cases[2:]:
        wrong = case.label != truth[case.id]
        assert (case.voxel_weight[wrong] == 0).all()
        assert (case.voxel_weight[~wrong] > 0).all()


def averaged(bench: Any, data: Path) -> list[Any]:
    """The scans as the bench reads them, with their labels."""
    settings = bench.load_settings(bench.ATRIA, env={})[0]
    return [case for _, case in bench.read_atria(data, 3, settings)]
