"""benchmarks/bench_la.py on small made-up atria: protocol windows, split, files; --evaluate repeats the scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aslseg.errors import NotEnoughCasesError
from aslseg.files import sha256
from aslseg.types import Volume
from aslseg.volume.io import write_image, write_label

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_la

    yield bench_la
    for handler in bench_la.logger.handlers[:]:
        bench_la.logger.removeHandler(handler)
        handler.close()


@pytest.fixture
def atria(tmp_path):
    """Six scans of 72 x 64 x 40 voxels with a bright ellipsoid, their labels, and a list."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (72, 64, 40)), indexing="ij")
    affine = np.diag([0.625, 0.625, 0.625, 1])
    names = [f"case{n}" for n in range(6)]
    for name in names:
        centre = rng.uniform(-0.2, 0.2, 3)
        label = (sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < 0.3).astype(np.uint8)
        image = 60 + 90 * label + rng.normal(0, 15, label.shape)
        write_image(tmp_path / "images" / f"{name}.nii.gz", Volume(image.astype(np.float32), affine))
        write_label(tmp_path / "labels" / f"{name}.nii.gz", label, affine)
    (tmp_path / "train.txt").write_text("\n".join(names) + "\n")
    return tmp_path


def run(bench, monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_la.py", *map(str, arguments)])
    return bench.main()


def test_trains_writes_everything_and_evaluate_repeats_the_scores(bench, atria, monkeypatch):
    folders = ("--images", atria / "images", "--labels", atria / "labels")
    small = ("--conf", "patch=32,32,16", "--iterations", 60, "--scale", "half", "--threads", 1)
    out = atria / "out"
    split = ("--labelled", 2, "--held-out", 2, "--conf", "learning_rate=0.02")
    assert run(bench, monkeypatch, *folders, *small, *split, "--method", "mean_teacher", "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["labelled"] == ["case0", "case1"]
    assert result["unlabelled"] == 2
    assert sorted(result["cases"]) == ["case4", "case5"]
    assert set(result["cases"]["case4"]["plain"]) == {"dice", "jaccard", "hd95", "asd"}
    assert result["summary"]["plain"]["dice"]["mean"] > 0.5
    assert "step 50/60" in (out / "log.txt").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["log.txt", "model.pt", "result.json"]

    listed = ("--list", atria / "train.txt", "--held-out", 2)
    assert run(bench, monkeypatch, "--evaluate", out / "model.pt", *folders, *listed, "--out", atria / "again") == 0
    again = json.loads((atria / "again" / "result.json").read_text())
    assert again["cases"] == result["cases"]


def test_goes_on_from_a_model(bench, atria, monkeypatch):
    folders = ("--images", atria / "images", "--labels", atria / "labels", "--scale", "half", "--threads", 1)
    small = ("--conf", "patch=32,32,16", "--labelled", 2, "--conf", "learning_rate=1e-9")
    first, then = atria / "first", atria / "then"
    assert run(bench, monkeypatch, *folders, *small, "--iterations", 2, "--method", "supervised", "--out", first) == 0
    more = ("--iterations", 1, "--method", "bcp_mt", "--init", first / "model.pt", "--out", then)
    assert run(bench, monkeypatch, *folders, *small, *more) == 0
    assert json.loads((then / "result.json").read_text())["init"] == sha256(first / "model.pt")
    one, other = (torch.load(f / "model.pt", weights_only=True)["state"] for f in (first, then))
    assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one if k.endswith("weight"))
    assert sorted(p.name for p in then.iterdir()) == ["log.txt", "model.pt", "result.json"]


def test_windows_are_the_unweighted_mean_over_the_protocols_positions(bench):
    class Voxelwise(nn.Module):
        """Class 1 where the window's own mean lies below the voxel: depends on the window, so positions matter."""

        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            d = x - x.mean((2, 3, 4), keepdim=True)
            return torch.cat([-d, d], 1)

    image = np.random.default_rng(0).random((11, 9, 5)).astype(np.float32)
    got = bench.predict(Voxelwise(), image, (6, 4, 8), (3, 2, 2), 2)
    padded = np.pad(image, [(0, 0), (0, 0), (1, 2)])
    x = (padded - 0.5) / 0.25
    total, count = np.zeros((2, *x.shape)), np.zeros(x.shape)
    for i in (0, 3, 5):
        for j in (0, 2, 4, 5):
            window = (slice(i, i + 6), slice(j, j + 4), slice(0, 8))
            d = x[window] - x[window].mean()
            total[(slice(None), *window)] += np.stack([1 / (1 + np.exp(2 * d)), 1 / (1 + np.exp(-2 * d))])
            count[window] += 1
    assert np.array_equal(got, (total / count).argmax(0)[:, :, 1:6])


def test_split(bench):
    assert bench.choose(list("abcdef"), 2, 1) == (["a", "b"], ["c", "d", "e"], ["f"])
    with pytest.raises(NotEnoughCasesError, match="ask for fewer"):
        bench.choose(list("abc"), 3, 1)


def test_bad_input_is_one_line_and_exit_code_1(bench, atria, monkeypatch, caplog):
    junk = atria / "junk.pt"
    junk.write_bytes(b"not a model")
    folders = ("--images", atria / "images", "--labels", atria / "labels")
    assert run(bench, monkeypatch, "--evaluate", junk, *folders) == 1
    assert "give a model.pt that bench_la.py wrote" in caplog.text
    (atria / "train.txt").write_text("case0\nnobody\n")
    assert run(bench, monkeypatch, *folders, "--scale", "half", "--labelled", 1, "--out", atria / "o") == 1
    assert "not in" in caplog.text


def test_the_model_that_ships_is_what_its_manifest_says(bench):
    path = SCRIPTS.parent / "apps" / "aslseg" / "pretrained" / "la_half_8.pt"
    entry = json.loads(path.with_name("manifest.json").read_text())[path.name]
    assert entry["sha256"] == sha256(path)
    assert entry["bytes"] == path.stat().st_size < 20e6
    network, metadata = bench.load_model(path, torch.device("cpu"))
    assert metadata["scale"] == "half"
    assert metadata["method"] in entry["what"]
    assert all(torch.isfinite(v).all() for v in network.state_dict().values())
