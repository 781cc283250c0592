"""benchmarks/bench_loop.py on small made-up atria: what each arm learns from, the table, and going on after a kill."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.ssl import engine
from aslseg.types import Volume
from aslseg.volume.io import write_image, write_label

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = [f"case{n}" for n in range(8)]  # two labelled, four unlabelled, one to choose by, one held out


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_loop

    for name, value in {"LABELLED": 2, "TRAINED": 6, "CHOSEN_BY": 7}.items():
        monkeypatch.setattr(bench_loop, name, value)
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
        write_image(tmp_path / "images" / f"{name}.nii.gz", Volume(image.astype(np.float32), np.eye(4)))
        write_label(tmp_path / "labels" / f"{name}.nii.gz", label, np.eye(4))
    (tmp_path / "train.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


def test_arms_learn_what_they_say_and_are_computed_once(
    bench: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[list[Any], Any]] = []
    train = engine.train

    def watched(labelled: list[Any], *rest: Any, **more: Any) -> Any:
        trained.append((labelled, more["init"]))
        return train(labelled, *rest, **more)

    monkeypatch.setattr(engine, "train", watched)
    out = data / "out"
    conf = ["--conf", "patch=32,32,16", "--conf", "network=unet", "--conf", "threads=1"]
    arguments = ["--data", str(data), "--out", str(out), "--steps", "4", "--sets", "2", *conf]
    arms = ["student", "today", "true labels", "fold 1"]
    monkeypatch.setattr(sys, "argv", ["bench_loop.py", *arguments, "--arms", ",".join(arms)])
    bench.main()

    # the masks of ssl, and the agreement of ssl and supervised, are computed first
    made = {
        name: json.loads((out / "set2" / name / "result.json").read_text())
        for name in bench.ARMS
        if (out / "set2" / name).exists()
    }
    assert list(made) == ["supervised", "ssl", "student", "today", "true labels", "fold 1"]
    assert all(list(r["dice"]) == ["case6", "case7"] for r in made.values())
    ssl, supervised, student, today, true, fold = trained
    assert [c.id for c in ssl[0]] == [c.id for c in supervised[0]] == ["case2", "case3"]
    assert [c.id for c in fold[0]] == ["case3"]
    assert sorted(c.id for c in student[0][2:]) == ["case0", "case1", "case4", "case5"]
    assert len(today[0]) == 2 + 2
    assert [today[1], student[1]] == [out / "set2" / "ssl" / "ssl.safetensors", None]
    with np.load(out / "set2" / "ssl" / "maps.npz") as maps:
        p = {name: maps[name].astype(np.float32) for name in maps.files}
    for case in student[0][2:]:
        np.testing.assert_array_equal(case.label, p[case.id] > 0.5)
        weights = np.maximum(0.1, np.abs(2 * p[case.id] - 1))
        np.testing.assert_allclose(case.voxel_weight.astype(np.float32), weights, atol=1e-3)
    assert set(np.unique(np.round(today[0][2].voxel_weight.astype(float), 2))) <= {0.3, 1.0}
    assert all((c.label == 1).any() and (c.voxel_weight == 1).all() for c in true[0][2:])
    assert set(made["true labels"]["learned"].values()) == {1.0}
    table = (out / "table.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == list(made)

    # a run that was killed before it had scored an arm trains nothing again
    (out / "set2" / "student" / "result.json").unlink()
    steps = engine.Trainer.step
    monkeypatch.setattr(engine.Trainer, "step", lambda *_: pytest.fail("trained again"))
    bench.main()
    monkeypatch.setattr(engine.Trainer, "step", steps)
    assert json.loads((out / "set2" / "student" / "result.json").read_text())["dice"] == made["student"]["dice"]
