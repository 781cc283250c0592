"""The whole loop over HTTP: first round by itself, masks, scores, a human label, rollback."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

from aslseg.compute.overlap import dice
from aslseg.types import Labels, Volume
from aslseg.volume.io import read_image, read_label

LABELS = Labels.parse("liver,tumour")
TURN = np.array([[0.96, -0.28, 0.0, 5.0], [0.28, 0.96, 0.0, -8.0], [0, 0, 1, 30.0], [0, 0, 0, 1]])


def scan_of(server: Any, case: str) -> Volume:
    return read_image(Path(server.studies) / f"{case}.nii.gz")


def truth_of(server: Any, case: str) -> np.ndarray:
    studies = Path(server.studies)
    folders = (studies / "labels" / "final", studies.with_name("studies_truth"))
    path = next(p for f in folders for p in f.rglob(f"{case}.nii.gz"))
    return np.asarray(nib.load(path).dataobj).astype(np.uint8)


def waiting(server: Any) -> str:
    """A scan without a human label."""
    found = server.client().datastore()["objects"]
    return next(c for c in sorted(found) if "final" not in found[c]["labels"])


def mask_of(file: str, volume: Volume) -> np.ndarray:
    """The mask, after checking that its grid is the scan's."""
    return read_label(Path(file), volume, LABELS)


def settle(server: Any, kind: str = "train", seconds: float = 240) -> dict[str, Any]:
    """Wait until the last task of a kind has ended."""
    end = time.monotonic() + seconds
    while True:
        task = requests.get(f"{server.url}/{kind}/", timeout=60).json()
        if task["status"] not in ("SUBMITTED", "RUNNING"):
            return task
        assert time.monotonic() < end, server.log[-3000:]
        time.sleep(0.5)


def test_first_round_starts_by_itself_and_is_seen(starting: Any) -> None:
    assert "the first round runs in the background" in starting.log
    end = time.monotonic() + 120
    stats: dict[str, Any] = {}
    while not stats and time.monotonic() < end:
        # both viewers look at the first trainer only
        stats = next(iter(starting.client().info()["train_stats"].values()))
        time.sleep(0.3)
    assert stats["total_epochs"] == 100
    assert 0 <= stats["epoch"] <= 100
    assert "best_metric" in stats
    page = requests.get(f"{starting.url}/aslseg/", timeout=60).text
    assert "stage" in page or "is done" in page
    if starting.client().train_status(check_if_running=True):
        assert requests.post(f"{starting.url}/train/round", json={}, timeout=60).status_code == 429


def test_round_publishes_ranks_and_promotes(trained: Any) -> None:
    assert settle(trained)["status"] == "DONE"
    status = requests.get(f"{trained.url}/aslseg/status", timeout=60).json()
    assert all(m["published"] and len(m["sha256"]) == 64 for m in status["models"])
    store = trained.client().datastore()["objects"]
    unlabelled = sorted(c for c, o in store.items() if "final" not in o["labels"])
    assert sorted(s["case"] for s in status["ranking"]) == unlabelled
    for case in unlabelled:
        info = store[case]["labels"]["original"]["info"]
        assert list(info["params"]["label_names"]) == ["liver", "tumour"], "Slicer names segments by this order"
        assert 0 <= store[case]["image"]["info"]["aslseg"]["agreement"] <= 1
    promoted = {p["case"] for p in status["promotions"] if p["status"] == "active"}
    assert promoted == {c for c, o in store.items() if "aslseg_pseudo" in o["labels"]}
    assert list(trained.client().info()["models"]) == ["aslseg", "ssl", "adapter", "sam", "sam_2d"]


def test_the_report_of_a_round(trained: Any) -> None:
    assert '<a href="/aslseg/reports/1">report</a>' in requests.get(f"{trained.url}/aslseg/", timeout=60).text
    answer = requests.get(f"{trained.url}/aslseg/reports/1", timeout=60)
    assert answer.ok
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "What each class can be trusted with" in answer.text
    assert str(Path(trained.studies)) not in answer.text
    (Path(trained.studies) / ".aslseg" / "reports" / "round-1.html").unlink()
    assert requests.get(f"{trained.url}/aslseg/reports/1", timeout=60).ok, "written again when it is asked for"
    for number, status in (("77", 404), ("0", 422), ("x", 422), ("9" * 300, 422)):
        refused = requests.get(f"{trained.url}/aslseg/reports/{number}", timeout=60)
        assert refused.status_code == status
        assert trained.studies not in refused.text


def test_every_model_on_a_case(trained: Any) -> None:
    case = waiting(trained)
    volume = scan_of(trained, case)
    masks = {}
    for model in ("ssl", "aslseg", "adapter", "sam"):
        file, result = trained.client().infer(model, case, {"result_extension": ".nrrd", "result_dtype": "uint8"})
        masks[model] = mask_of(file, volume)
        names = result["label_names"]
        assert sorted(names.values()) == list(range(1, len(names) + 1))
        assert result["latencies"]["total"] >= max(v for k, v in result["latencies"].items() if k != "total") - 0.01
    assert masks["ssl"].any()
    assert set(np.unique(masks["sam"])) <= {0, 1}


def test_stored_mask_comes_at_once(trained: Any) -> None:
    case = waiting(trained)
    _, result = trained.client().infer("aslseg", case, {})
    assert result["source"] == "stored"
    assert result["latencies"]["total"] < 1
    stored = nib.load(Path(trained.studies) / "labels" / "original" / f"{case}.nii.gz")
    file, _ = trained.client().infer("aslseg", case, {"result_extension": ".nii.gz"})
    assert (np.asarray(nib.load(file).dataobj) == np.asarray(stored.dataobj)).all()


def test_what_the_round_refined_is_not_computed_again(trained: Any) -> None:
    case = waiting(trained)
    file, result = trained.client().infer("adapter", case, {})
    assert result["source"] == "stored"
    mask_of(file, scan_of(trained, case))
    file, result = trained.client().infer("adapter", "", {}, file=str(Path(trained.studies) / f"{case}.nii.gz"))
    assert "source" not in result, "an upload is computed"


def test_clicks_on_a_trained_server(trained: Any) -> None:
    case = waiting(trained)
    liver = truth_of(trained, case) > 0
    inside = np.argwhere(liver)
    point = inside[len(inside) // 2].tolist()
    outside = [0, 0, point[2]]
    params = {"label": "liver", "foreground": [point], "background": [outside]}
    file, result = trained.client().infer("sam", case, params)
    mask = mask_of(file, scan_of(trained, case))
    assert (mask[tuple(point)], mask[tuple(outside)]) == (1, 0)
    assert result["source"] == "clicks"


@pytest.mark.parametrize("model", ["ssl", "aslseg", "adapter", "sam", "sam_2d"])
def test_every_model_on_an_uploaded_file(trained: Any, model: str) -> None:
    case = waiting(trained)
    path = Path(trained.studies) / f"{case}.nii.gz"
    file, result = trained.client().infer(model, "", {"result_extension": ".nrrd"}, file=str(path))
    assert mask_of(file, scan_of(trained, case)) is not None
    assert result.get("source") != "stored"


def test_adapter_on_a_mask_sent_along(trained: Any) -> None:
    case = waiting(trained)
    sent = Path(trained.studies) / "labels" / "original" / f"{case}.nii.gz"
    file, result = trained.client().infer("adapter", case, {}, label_in=str(sent))
    assert result["source"] == "label"
    assert mask_of(file, scan_of(trained, case)) is not None


@pytest.mark.parametrize("how", ["flipped", "permuted", "oblique"])
def test_geometry_of_other_axes(trained: Any, tmp_path: Path, how: str) -> None:
    """The same body stored with other axes gives the same mask, stored with those axes."""
    case = waiting(trained)
    scan = nib.load(Path(trained.studies) / f"{case}.nii.gz")
    file, _ = trained.client().infer("ssl", case, {"result_extension": ".nii.gz"})
    expected = nib.load(file)
    if how == "oblique":
        changed = [nib.Nifti1Image(np.asarray(n.dataobj), TURN @ n.affine) for n in (scan, expected)]
    else:
        codes = {"flipped": "LPI", "permuted": "SRA"}[how]
        to = nib.orientations.axcodes2ornt(codes)
        changed = [
            n.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(n.affine), to)) for n in (scan, expected)
        ]
    path = tmp_path / f"{how}.nii.gz"
    nib.save(changed[0], path)
    file, _ = trained.client().infer("ssl", "", {"result_extension": ".nrrd"}, file=str(path))
    mask = mask_of(file, read_image(path))
    wanted = np.asarray(changed[1].dataobj)
    assert wanted.any()
    assert (mask == wanted).mean() > 0.9999
    inside = np.argwhere(wanted > 0)
    point = inside[len(inside) // 2].tolist()
    file, _ = trained.client().infer("sam", "", {"label": "liver", "foreground": [point]}, file=str(path))
    assert mask_of(file, read_image(path))[tuple(point)] == 1


def test_class_prompts_of_ohif(trained: Any) -> None:
    case = waiting(trained)
    params = {
        "label_prompt": [2],
        "result_extension": ".nrrd",
        "result_dtype": "uint8",
        "result_compress": False,
    }
    answer = requests.post(
        f"{trained.url}/infer/ssl?image={case}&output=image", data={"params": json.dumps(params)}, timeout=120
    )
    voxels = np.frombuffer(answer.content.partition(b"\n\n")[2], np.uint8)
    assert set(np.unique(voxels)) <= {0, 2}


def test_info_answers_while_a_volume_is_computed(trained: Any, tmp_path: Path) -> None:
    scan = nib.load(Path(trained.studies) / f"{waiting(trained)}.nii.gz")
    rng = np.random.default_rng(0)
    noisy = np.tile(np.asarray(scan.dataobj), (2, 2, 2)) + rng.integers(0, 5, (1, 1, 1))
    path = tmp_path / "large.nii.gz"
    nib.save(nib.Nifti1Image(noisy.astype(np.int16), scan.affine), path)
    done = []

    def work() -> None:
        done.append(trained.client().infer("adapter", "", {}, file=str(path)))

    thread, begun = threading.Thread(target=work), time.perf_counter()
    thread.start()
    slowest, asked = 0.0, 0
    while thread.is_alive():
        start = time.perf_counter()
        requests.get(f"{trained.url}/info/", timeout=60)
        slowest, asked = max(slowest, time.perf_counter() - start), asked + 1
        time.sleep(0.05)
    took = time.perf_counter() - begun
    assert done
    assert asked > 3
    assert slowest < max(2, took / 5), "two cores, shared; MONAI Label alone would block for the whole inference"


def test_strategies_rank_by_agreement(trained: Any) -> None:
    ranking = requests.get(f"{trained.url}/aslseg/status", timeout=60).json()["ranking"]
    order = [s["case"] for s in ranking]
    lowest = trained.client().next_sample("agreement", {"client_id": "eve"})
    assert lowest["id"] == order[lowest["rank"] - 1]
    assert lowest["agreement"] == pytest.approx(ranking[lowest["rank"] - 1]["agreement"], abs=1e-3)
    highest = trained.client().next_sample("confirm", {"client_id": "adam"})
    assert highest["agreement"] >= lowest["agreement"]
    assert trained.client().next_sample("random", {})["id"] in order
    assert requests.post(f"{trained.url}/scoring/agreement", json={}, timeout=60).ok


def test_batch_inference_keeps_final_and_skips_what_fails(trained: Any) -> None:
    body = {"images": [waiting(trained), "no-such-scan"], "label_tag": "ssl_only"}
    assert requests.post(f"{trained.url}/batch/infer/ssl", json=body, timeout=60).ok
    task = settle(trained, "batch/infer")
    assert task["status"] == "DONE", task["details"]
    tags = {c: set(o["labels"]) for c, o in trained.client().datastore()["objects"].items()}
    assert [c for c, t in tags.items() if "ssl_only" in t] == body["images"][:1]


def test_save_as_slicer_does_then_roll_back(trained: Any, tmp_path: Path) -> None:
    """Segments in another order than `labels`, with a background segment in front that shifts Slicer's idx."""
    studies = Path(trained.studies)
    before = {p: p.read_bytes() for p in (studies / "labels" / "final").glob("*.nii.gz")}
    case = waiting(trained)
    true = truth_of(trained, case)
    swapped = np.select([true == 1, true == 2], [2, 1], 0).astype(np.uint8)
    upload = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(swapped, scan_of(trained, case).affine), upload)
    names = [{"name": "background", "idx": 1}, {"name": "tumour", "idx": 2}, {"name": "liver", "idx": 3}]
    client = trained.client()
    client.save_label(case, str(upload), "final", {"label_info": names, "client_id": "ann"})
    saved = np.asarray(nib.load(studies / "labels" / "final" / f"{case}.nii.gz").dataobj)
    assert dice(saved == 1, true == 1) == 1
    assert client.next_sample("agreement", {"client_id": "zoe"})["id"] != case
    client.train_start("round", {})
    assert settle(trained)["status"] == "DONE", client.train_status()["details"]
    status = requests.get(f"{trained.url}/aslseg/status", timeout=60).json()
    assert status["rounds"][0]["round"] >= 2
    assert case not in [s["case"] for s in status["ranking"]]
    from aslseg.rounds.label_files.rollback import roll_back
    from aslseg.settings import Paths, load_settings

    settings, _ = load_settings({"model_dir": str(trained.folder / "models")}, env={})
    roll_back(Paths(settings, studies), 1)
    tags = {c: set(o["labels"]) for c, o in client.datastore()["objects"].items()}
    assert not any("aslseg_pseudo" in t for t in tags.values())
    assert list(client.info()["models"]) == ["sam", "sam_2d"], "models are those from before round 1: none"
    after = {p: p.read_bytes() for p in (studies / "labels" / "final").glob("*.nii.gz")}
    assert before.items() < after.items(), "human labels are never touched"
    assert len(after) == len(before) + 1


def test_stop_a_training_then_go_on(trained: Any) -> None:
    """Runs last: nothing is published any more, so a round has all to do again."""
    client = trained.client()
    shutil.rmtree(Path(trained.studies) / ".aslseg" / "rounds")
    client.train_start("round", {})
    end = time.monotonic() + 300
    while requests.get(f"{trained.url}/aslseg/status", timeout=60).json()["progress"]["state"] != "running":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert client.train_stop()["status"] == "STOPPED"
    assert not client.train_status(check_if_running=True)
    end = time.monotonic() + 120
    while requests.get(f"{trained.url}/aslseg/status", timeout=60).json()["progress"]["state"] != "interrupted":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert "goes on where it stopped" in requests.get(f"{trained.url}/aslseg/", timeout=60).text
