"""benchmarks/bench_loop.py on small made-up livers with tumours: splits, masks, both stages, scores and tables."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from aslseg.compute.weights import read_metadata
from aslseg.errors import BadLabelError
from aslseg.ssl import engine
from aslseg.volume.io import read_image, write_image, write_label
from aslseg.volume.phantom import make_phantom

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
PATIENTS = ["a", "b", "c", "d", "a", "e"]  # the last one is healthy
CONF = {"network": "unet", "patch": "32,32,16", "overlap": 0, "batch_labelled": 1, "batch_unlabelled": 1, "threads": 1}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules, with two rotations of three scans."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_loop
    import lits_scoring
    import loop_data
    import loop_table

    monkeypatch.setattr(lits_scoring, "ROTATIONS", ((0, 1, 2), (1, 2, 3)))
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 1)
    monkeypatch.setattr(engine, "CLASS_BATCHES", 1)
    return Namespace(loop=bench_loop, scoring=lits_scoring, data=loop_data, table=loop_table)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Scans of 24 x 24 x 8 voxels."""
    folder, rows = tmp_path / "livers", ["case,patient,tumour_ml"]
    for n, patient in enumerate(PATIENTS):
        volume, label = make_phantom(1, n, shape=(24, 24, 8))
        name = f"lits_{n:03d}"
        write_image(folder / "images" / f"{name}.nii.gz", volume)
        label = np.minimum(label, 1) if patient == "e" else label
        write_label(folder / "labels" / f"{name}.nii.gz", label, volume.affine)
        rows.append(f"{name},{patient},1")
    (folder / "patients.csv").write_text("\n".join(rows) + "\n")
    return folder


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *arguments: str) -> None:
    given = ["--data", str(data), "--cache", str(data.parent / "cache"), "--out", str(out), "--steps", "5"]
    conf = [part for key, value in CONF.items() for part in ("--conf", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["bench_loop.py", *given, "--labelled", "2", *conf, *arguments])
    bench.loop.main()


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/result.json"))}


def models(folder: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted(folder.glob("*/ssl.safetensors"))}


def test_scans_of_other_patients_are_unlabelled_and_scored(bench: Any, data: Path, tmp_path: Path) -> None:
    settings = bench.loop.load_settings(bench.data.LIVERS, env={})[0]
    scans = bench.data.livers(data, 2, 1, settings, tmp_path / "cache")
    assert [c.id for c in scans.labelled] == ["lits_000", "lits_001"]
    # the second scan of patient a is learned without label, but not scored
    assert [c.id for c in scans.unlabelled] == ["lits_002", "lits_003", "lits_004", "lits_005"]
    assert [c.id for c in scans.scored] == ["lits_002", "lits_003", "lits_005"]
    assert all(c.label is None for c in scans.unlabelled)
    for case in scans.labelled:
        np.testing.assert_array_equal(scans.truth(case.id), case.label)
    with pytest.raises(SystemExit, match="1 to 3 labelled livers, got 4"):
        bench.data.livers(data, 4, 1, settings, tmp_path / "cache")


def test_an_arm_learns_both_stages_and_the_masks_that_agree_best(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seen: list[tuple[list[Any], Path | None]] = []
    train = bench.loop.training.train

    def watched(labelled: Any, free: Any, settings: Any, path: Path, **more: Any) -> Any:
        seen.append((list(labelled), more["init"]))
        assert [c.id for c in free] == ["lits_000", "lits_003", "lits_004", "lits_005"]
        assert settings.seed == 1338
        return train(labelled, free, settings, path, **more)

    monkeypatch.setattr(bench.loop.training, "train", watched)
    arms = "today,true labels,ensemble,round aslseg"
    # masks after five steps hold no tumour, or anything
    run(bench, monkeypatch, data, out, "--sets", "2", "--arms", arms, "--conf", "promote_empty=1")
    folder = out / "lits_labels2" / "set2"
    made = results(folder)
    assert set(made) == {"ssl", "supervised", "today", "true labels", "fold 1", "fold 2", "ensemble"}
    for name in ("ssl", "today", "true labels"):
        assert set(read_metadata(folder / name / "ssl.safetensors")["stages"]["second"]) == {"liver"}
    start, today = folder / "ssl" / "ssl.safetensors", seen[2][0]
    assert [init for _, init in seen] == [None, None, start, None, None, None]
    assert [c.id for c in today[:2]] == ["lits_001", "lits_002"]
    assert {c.id for c in today[2:]} == set(made["today"]["learned"])
    best = sorted(made["today"]["agreement"].values())[-2:]
    assert sorted(made["today"]["agreement"][c.id] for c in today[2:]) == best
    for case in today[2:]:
        with np.load(folder / "ssl" / "maps.npz") as maps:
            p = maps[case.id].astype(np.float32)
        assert p.shape == (2, 24, 24, 8)
        np.testing.assert_array_equal(case.label, np.where(p[1] >= 0.5, 2, p[0] >= 0.5))
        assert set(np.unique(np.round(case.voxel_weight.astype(float), 2))) <= {0.3, 1.0}
    true = seen[3][0][2:]
    assert [c.id for c in true] == ["lits_000", "lits_003", "lits_004", "lits_005"]
    assert {2, 1} <= set(np.unique(true[0].label))
    assert (true[0].voxel_weight == 1).all()
    assert set(made["true labels"]["learned"].values()) == {1.0}
    # a healthy liver has no Dice of its tumour
    assert made["true labels"]["by_label"]["tumour"]["masks"] == dict.fromkeys(
        ["lits_000", "lits_003", "lits_004"], 1.0
    )
    by_label = made["today"]["by_label"]["liver"]
    assert by_label["masks"].keys() == by_label["agreement"].keys() == made["today"]["agreement"].keys()
    assert by_label["learned"].keys() == made["today"]["learned"].keys()


def test_scores_of_a_pool(bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are those of the class map of the kept probabilities; a second call trains and scores nothing."""
    out = tmp_path / "out"
    run(bench, monkeypatch, data, out, "--arms", "ssl", "--steps", "20")
    [made] = results(out / "lits_labels2" / "set1").values()
    assert [row["case"] for row in made["rows"]] == list(made["dice"]) == ["lits_002", "lits_003", "lits_005"]
    settings = bench.loop.load_settings(bench.data.LIVERS, env={})[0]
    scans = bench.data.livers(data, 2, 1, settings, tmp_path / "cache")
    assert [row["tumour"]["lesions"] > 0 for row in made["rows"]] == [True, True, False]
    for row in made["rows"]:
        # a healthy liver counts by its liver alone
        parts = [row["liver"], row["tumour"]["dice"]] if row["tumour"]["lesions"] else [row["liver"]]
        assert made["dice"][row["case"]] == pytest.approx(np.mean(parts))
        with np.load(out / "lits_labels2" / "set1" / "ssl" / "maps.npz") as maps:
            found = maps[row["case"]][0] >= 0.5
        true = scans.truth(row["case"]) > 0
        assert row["liver"] == pytest.approx(2 * (found & true).sum() / (found.sum() + true.sum()))
    assert "### lits_labels2, by label" in (out / "table.md").read_text()

    monkeypatch.setattr(bench.loop.training, "train", lambda *_, **__: pytest.fail("trained again"))
    run(bench, monkeypatch, data, out, "--arms", "ssl", "--steps", "20")
    (out / "lits_labels2" / "set1" / "ssl" / "result.json").unlink()
    run(bench, monkeypatch, data, out, "--arms", "ssl", "--steps", "20")
    assert results(out / "lits_labels2" / "set1")["ssl"]["rows"] == made["rows"]
    # a model of another length is not taken for this one
    (out / "lits_labels2" / "set1" / "ssl" / "result.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        run(bench, monkeypatch, data, out, "--arms", "ssl", "--steps", "21")


def test_labels_of_unlabelled_scans_change_no_model(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = tmp_path / "poisoned"
    shutil.copytree(data, poisoned)
    for n in (2, 3, 4, 5):
        volume = read_image(data / "images" / f"lits_{n:03d}.nii.gz")
        write_label(poisoned / "labels" / f"lits_{n:03d}.nii.gz", np.full(volume.array.shape, 2), volume.affine)
    arms = ["--arms", "today", "--conf", "promote_empty=1"]
    for folder in (data, poisoned):
        run(bench, monkeypatch, folder, tmp_path / f"out-{folder.name}", *arms)
    right, wrong = (tmp_path / f"out-{folder.name}" / "lits_labels2" / "set1" for folder in (data, poisoned))
    assert set(models(right)) == {"ssl", "supervised", "today"}
    assert models(right) == models(wrong)
    assert results(right)["today"]["learned"].keys() == results(wrong)["today"]["learned"].keys()
    assert results(right)["today"]["dice"] != results(wrong)["today"]["dice"]


def test_an_arm_that_does_not_exist_is_named(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"no such arm with 2 labels: tody; arms: supervised, ssl, "):
        run(bench, monkeypatch, data, tmp_path / "out", "--arms", "ssl,tody")
    assert not (tmp_path / "out").exists()


def test_a_label_that_cannot_be_read_ends_the_scores_and_changes_no_model(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(bench, monkeypatch, data, tmp_path / "right", "--arms", "ssl")
    for n in (2, 3, 4, 5):
        path = data / "labels" / f"lits_{n:03d}.nii.gz"
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine), path)
    with pytest.raises(BadLabelError, match="lits_002"):
        run(bench, monkeypatch, data, tmp_path / "wrong", "--arms", "ssl")
    right, wrong = (models(tmp_path / out / "lits_labels2" / "set1") for out in ("right", "wrong"))
    assert set(right) == {"ssl"}
    assert right == wrong


def row(case: str, liver: float, tumour: float | None) -> dict[str, Any]:
    lesions = 0 if tumour is None else 2
    score = {"dice": tumour, "lesions": lesions, "found": min(1, lesions), "false": 3, "ml": 1.0, "predicted_ml": 1.0}
    return {"case": case, "patient": case, "liver": liver, "tumour": score}


def write_result(folder: Path, setting: str, number: int, arm: str, result: dict[str, Any]) -> None:
    path = folder / setting / f"set{number}" / arm / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"units": 1, "unit": 600} | result))


def test_scans_of_all_data_sets_are_pooled_and_labels_tested_apart(bench: Any, tmp_path: Path) -> None:
    """Six atria and six livers, of which the sets score different ones: each counts once, all give one p."""
    rng = np.random.default_rng(0)
    atria = dict(zip([f"atrium{n}" for n in range(6)], rng.uniform(0.7, 0.8, 6), strict=True))
    livers = dict(zip([f"liver{n}" for n in range(6)], rng.uniform(0.6, 0.8, 6), strict=True))
    for arm, gain in {"ssl at equal compute": 0.0, "today": 0.02}.items():
        for number in (1, 2):
            dice = {case: value + gain for case, value in atria.items()}
            write_result(tmp_path, "edge2_labels4", number, arm, {"dice": dice})
            rows = []
            for case, value in list(livers.items())[number - 1 : number + 4]:
                # worse livers, better tumours; the last is healthy
                ill = None if case == "liver5" else value / 2 + 3 * gain
                rows.append(row(case, value - gain, ill))
            dice = {r["case"]: float(np.mean([v for v in (r["liver"], r["tumour"]["dice"]) if v])) for r in rows}
            write_result(tmp_path, "lits_labels4", number, arm, {"dice": dice, "rows": rows})
    text = bench.table.tables([tmp_path])
    titles = [part.splitlines()[0] for part in text.split("### ")[1:]]
    assert titles == ["edge2_labels4", "lits_labels4", "lits_labels4, by label", "all settings"]
    cells = {
        title: {line.split(" | ")[0].strip("| "): line.split(" | ") for line in part.splitlines()}
        for title, part in zip(titles, text.split("### ")[1:], strict=True)
    }
    # arms that learn the true labels of scored scans are no ceiling
    assert "gap closed" in cells["edge2_labels4"]["arm"]
    assert not {"gap closed", "held out"} & {*cells["lits_labels4"]["arm"]}
    by_label = cells["lits_labels4, by label"]
    head, today = by_label["arm"], by_label["today"]
    named = dict(zip(head, today, strict=True))
    assert named["liver minus `ssl at equal compute`"] == "-0.020, p 0.031 (2)"
    # five livers have a tumour
    assert named["tumour minus `ssl at equal compute`"] == "+0.060, p 0.062 (2)"
    assert named["lesion recall"].startswith("0.500")
    assert named["false lesions a scan"].startswith("3.000")
    # five ill livers +0.02, a healthy one -0.02, six atria +0.02
    mean = (5 * 0.02 - 0.02 + 6 * 0.02) / 12
    everything = cells["all settings"]["today"]
    assert everything[1].startswith(f"{mean:+.3f}, p ")
    assert everything[1].endswith("(4)")
    assert "-0.020 (lits_labels4 liver)" in everything[-1]


def test_maps_of_one_label_written_before_are_read(bench: Any, tmp_path: Path) -> None:
    one = object.__new__(bench.loop.Bench)
    one.work = tmp_path
    (tmp_path / "ssl").mkdir()
    p = np.linspace(0, 1, 8, dtype=np.float16).reshape(2, 2, 2)
    np.savez_compressed(tmp_path / "ssl" / "maps.npz", scan=p)
    case = Namespace(id="scan")
    np.testing.assert_array_equal(one.regions("ssl", case), p[None].astype(np.float32))
