"""benchmarks/bench_sam.py on small made-up atria with a tiny SAM: the annotator's clicks, files, table, errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aslseg.compute.weights import save_weights
from aslseg.errors import NotEnoughCasesError
from aslseg.sam.modeling.architecture import build
from aslseg.types import Volume
from aslseg.volume.io import write_image, write_label
from seeing_sam import TINY

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_sam

    monkeypatch.setattr(bench_sam, "HELD_OUT_ATRIA", 2)
    return bench_sam


@pytest.fixture
def data(tmp_path):
    """Six scans of 40 x 32 x 6 voxels with a bright disc, beside it a smaller one, on reversed axes; and a tiny SAM."""
    i, j = np.meshgrid(np.arange(40), np.arange(32), indexing="ij")
    discs = ((i - 14) ** 2 + (j - 18) ** 2 < 64) | ((i - 33) ** 2 + (j - 6) ** 2 < 9)
    label = np.repeat(discs[..., None], 6, 2).astype(np.uint8)
    label[..., 0] = 0
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    names = [f"case{n}" for n in range(6)]
    for n, name in enumerate(names):
        image = 60 + 90 * label + np.random.default_rng(n).normal(0, 9, label.shape)
        write_image(tmp_path / "la" / "images" / f"{name}.nii.gz", Volume(image.astype(np.float32), affine))
        write_label(tmp_path / "la" / "labels" / f"{name}.nii.gz", label, affine)
    (tmp_path / "la" / "train.txt").write_text("\n".join(names) + "\n")
    torch.manual_seed(0)
    weights = {"kind": "sam", "architecture": TINY.to_metadata()}
    save_weights(tmp_path / "tiny.safetensors", build(TINY).state_dict(), weights)
    return tmp_path


def run(bench, monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_sam.py", *map(str, arguments)])
    return bench.main()


def test_measures_fine_tunes_and_writes_everything_the_same_way_twice(bench, data, monkeypatch, capsys):
    options = ("--organ", "atrium", "--data", data, "--sam", data / "tiny.safetensors", "--threads", 1)
    small = ("--steps", 2, "--slices", 2, "--conf", "sam_batch=1", "--conf", "device=cpu")
    results = []
    for out in (data / "one", data / "two"):
        assert run(bench, monkeypatch, *options, *small, "--out", out) == 0
        results.append(json.loads((out / "results.json").read_text()))
        written = sorted(p.name for p in out.iterdir())
        assert written == ["finetuned.safetensors", "pictures.png", "results.json", "table.md"]
        assert (out / "table.md").read_text() in capsys.readouterr().out
    first, second = ([row["slices"] for row in r["rows"]] for r in results)
    assert first == second
    result = results[0]
    assert result["fine_tuned_on"] == ["case0", "case1", "case2", "case3"]
    assert sorted(result["measured_on"]) == ["case4", "case5"]
    assert [r["model"] for r in result["rows"]] == [
        "random",
        "tiny.safetensors, not fine-tuned",
        "fine-tuned on 4 scans (full, 2 steps)",
    ]
    summary = result["rows"][0]["summary"]["atrium"]
    assert (summary["slices"], summary["scans"], summary["patients"]) == (4, 2, 2)
    one = result["rows"][0]["slices"][0]
    assert one["k"] == 1  # the empty slice is passed over
    assert one["clicks"][0] == [39 - 14, 31 - 18, 1]  # the larger disc's middle, on axes that are turned round
    assert summary["box"]["mean"] == pytest.approx(np.mean([s["box"] for s in result["rows"][0]["slices"]]))


def test_clicks_go_where_the_largest_error_is_deepest(bench):
    truth = np.zeros((20, 30), bool)
    truth[2:13, 3:16] = True
    assert bench.next_click(truth, np.zeros_like(truth))[::2] == (7, 1)
    leaked = truth.copy()
    leaked[14:19, 20:29] = True
    leaked[2:5, 3:6] = False
    assert bench.next_click(truth, leaked) == (16, 22, 0)
    assert bench.next_click(truth, truth) is None


def test_clicks_on_an_object_that_is_drawn_repair_it(bench):
    """A SAM that draws 5 x 5 squares round foreground clicks, and what the box holds."""

    class Squares:
        shape = (24, 20)

        def on_slice(self, prompt):
            drawn = np.zeros(self.shape, bool)
            if prompt.box is not None:
                (i0, i1), (j0, j1), (k0, k1) = prompt.box
                assert k0 == k1 == prompt.slice == 3
                drawn[i0 : i1 + 1, j0 : j1 + 1] = True
            for i, j, _ in prompt.foreground:
                drawn[i - 2 : i + 3, j - 2 : j + 3] = True
            return 3, drawn

    truth = np.zeros((24, 20), bool)
    truth[4:9, 5:15] = True
    asked = bench.Asked("scan", "patient", "atrium", 3, np.zeros((24, 20)), truth)
    bench.ask(Squares(), asked)
    scores = asked.scores()
    assert scores["box"] == 1
    assert asked.clicks[0][0] == 6
    assert scores["1"] < scores["3"] <= scores["5"]
    assert len(asked.clicks) <= 5


def test_bad_input_is_one_line_and_exit_code_1(bench, data, monkeypatch, caplog):
    there = ("--organ", "atrium", "--data", data, "--out", data / "out")
    assert run(bench, monkeypatch, *there, "--data", data / "nowhere") == 1
    assert "no such folder; give --data" in caplog.text
    assert run(bench, monkeypatch, *there, "--mode", "everything") == 1
    assert "sam_train" in caplog.text
    assert run(bench, monkeypatch, *there, "--sam", data / "absent.safetensors") == 1
    assert "absent.safetensors" in caplog.text
    (data / "la" / "labels" / "case5.nii.gz").unlink()
    assert run(bench, monkeypatch, *there) == 1
    assert "no label of case5" in caplog.text
    (data / "la" / "train.txt").write_text("case0\ncase1\n")
    with pytest.raises(NotEnoughCasesError, match="ask for fewer"):
        bench.cases("atrium", data, None, data)
