"""benchmarks/bench_annotator.py on the smallest phantoms: what is spent, what strategies hand out, and going on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.volume.io import read_image, write_label
from tiny_rounds import tiny_sam


@pytest.fixture
def bench(short_nights: Any) -> Any:
    import bench_annotator

    return bench_annotator


TINY = {
    "ssl_iterations": "12",
    "retrain_iterations": "2",
    "sam_iterations": "1",
    "adapter_iterations": "2",
    "label_folds": "0",
    "validation_fraction": "0",
    "network": "unet",
    "threads": "1",
    "audits": "0",
}


def test_a_curve_of_two_rounds_goes_on_after_a_kill(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bench.Plan(nights=2, labels=2, pool=7, first=2, strategy="foreground")
    conf = bench.PHANTOM | TINY | {"sam_checkpoint": str(tiny_sam(tmp_path / "sam.safetensors"))}
    save = bench.Week.label

    def killed(self: Any, strategy: str, case: str) -> None:
        save(self, strategy, case)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bench.Week, "label", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.run(tmp_path, plan, conf, None)
    assert bench.run(tmp_path, plan, conf, None)
    out = tmp_path / "foreground" / "seed1"
    first, second = json.loads((out / "nights.json").read_text())
    assert [first["trained_on"], second["trained_on"]] == [2, 4]
    assert [first["corrected"], first["audits"], second["audits"]] == [0, 0, 0]
    corrected = json.loads((out / "corrected.json").read_text())
    labelled = {p.name.split(".")[0] for p in (out / "studies" / "labels" / "final").iterdir()}
    assert len(labelled) == 2 + 2 * 2
    assert set(corrected) == labelled - {"scan_000", "scan_001"}
    assert second["corrected"] == sum(list(corrected.values())[:2])
    # three labels are the same at last, and another process would not compute it twice
    (tmp_path / "random").mkdir()
    (out.parent).rename(tmp_path / "random" / "moved")
    (tmp_path / "random" / "moved" / "seed1").rename(tmp_path / "random" / "seed1")
    assert "| random | 1 | " in bench.table(tmp_path)


def test_corrected_voxels_are_those_of_the_shown_mask_that_are_wrong(bench: Any, tmp_path: Path) -> None:
    plan = bench.Plan(pool=4, first=1)
    settings = bench.load_settings(bench.PHANTOM | {"model_dir": str(tmp_path / "models")}, env={})[0]
    import bench_nights

    bench_nights.build(tmp_path, plan, bench_nights.phantoms(1))
    person = bench.Annotator(tmp_path, plan, settings)
    true = read_image(tmp_path / "truth" / "scan_002.nii.gz")
    shown = true.array.astype(np.uint8)
    shown[:3, :4, :5] = 1 - shown[:3, :4, :5]
    write_label(tmp_path / "studies" / "labels" / "original" / "scan_002.nii.gz", shown, true.affine)
    person.label("random", "scan_002")
    person.label("random", "scan_003")
    # without a mask everything is drawn
    drawn = int((read_image(tmp_path / "truth" / "scan_003.nii.gz").array > 0).sum())
    assert person.corrected() == {"scan_002": 60, "scan_003": drawn}
    # only a scan whose mask holds the label
    empty, other = np.zeros_like(shown), read_image(tmp_path / "truth" / "scan_001.nii.gz")
    write_label(tmp_path / "studies" / "labels" / "original" / "scan_001.nii.gz", empty, other.affine)
    assert {person.foreground(["scan_001", "scan_002"]) for _ in range(8)} == {"scan_002"}
    assert {person.foreground(["scan_001"])} == {"scan_001"}


def test_labels_for_a_dice_are_interpolated(bench: Any) -> None:
    curve = np.array([[2, 0, 0.6], [4, 100, 0.8], [6, 200, 0.9]])
    assert bench.labels_for(curve, 0.7) == pytest.approx(3)
    assert bench.labels_for(curve, 0.5) == 2
    assert bench.labels_for(curve, 0.95) is None


def test_each_seed_has_labels_of_its_own(bench: Any) -> None:
    scans = bench.rotated(lambda n: n, 8, 2)
    assert [scans(n) for n in range(10)] == [2, 3, 4, 5, 6, 7, 0, 1, 8, 9]
    assert replace(bench.Plan(), seed=2).seed == 2
