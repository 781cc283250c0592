"""Before anything is trained: `sam` works, the rest says what is missing, the viewers get on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import monailabel
import nibabel as nib
import numpy as np
import requests

from aslseg.serving.ohif_patches import MARK
from aslseg.types import Labels, Volume
from aslseg.volume.io import read_label

LABELS = Labels.parse("liver,tumour")
CASE = "phantom_000"


def truth(server: Any) -> np.ndarray:
    folder = Path(server.studies).with_name("studies_truth")
    path = next(folder.rglob(f"{CASE}.nii.gz"))
    return np.asarray(nib.load(path).dataobj)


def centre_of(mask: np.ndarray) -> list[int]:
    inside = np.argwhere(mask)
    return inside[np.abs(inside - inside.mean(0)).sum(1).argmin()].tolist()


def test_info(untrained: Any) -> None:
    info = untrained.client().info()
    assert list(info["models"]) == ["sam", "sam_2d"]
    assert list(info["trainers"]) == ["round", "ssl", "sam", "adapter"]
    assert list(info["strategies"]) == ["agreement", "confirm", "audit", "random"]
    assert list(info["scoring"]) == ["agreement"]
    assert info["labels"] == ["liver", "tumour"]
    assert "config" not in info, "Slicer refuses a server whose info has this key"
    assert "Not trained yet" in info["description"]
    assert info["datastore"]["total"] == 4, "three scans and a broken one; notes.txt is no scan"


def test_next_sample(untrained: Any) -> None:
    for strategy in ("agreement", "confirm", "audit", "random"):
        sample = untrained.client().next_sample(strategy, {})
        assert sample["id"] in {"phantom_000", "phantom_001", "phantom_002"}, "the broken one is never handed out"
        assert Path(sample["path"]).is_file()
        assert sample["reason"]


def test_a_click_gives_the_object_from_the_first_second(untrained: Any) -> None:
    liver = truth(untrained) > 0
    point = centre_of(liver)
    params = {"label": "liver", "foreground": [point], "background": [[0, 0, 0]], "result_extension": ".nrrd"}
    file, result = untrained.client().infer("sam", CASE, {**params, "result_dtype": "uint8"})
    scan = nib.load(Path(untrained.studies) / f"{CASE}.nii.gz")
    mask = read_label(Path(file), Volume(np.zeros(scan.shape, np.float32), scan.affine), LABELS)
    assert mask[tuple(point)] == 1
    assert mask[0, 0, 0] == 0
    assert set(np.unique(mask)) == {0, 1}
    assert result["label_names"] == {"liver": 1}
    assert result["latencies"]["total"] > 0


def test_without_a_click_an_empty_mask(untrained: Any) -> None:
    file, result = untrained.client().infer("sam", CASE, {})
    scan = nib.load(Path(untrained.studies) / f"{CASE}.nii.gz")
    mask = read_label(Path(file), Volume(np.zeros(scan.shape, np.float32), scan.affine), LABELS)
    assert not mask.any()
    assert result["source"] == "nothing clicked"


def test_what_is_not_trained_says_so(untrained: Any) -> None:
    for model in ("ssl", "aslseg", "adapter"):
        answer = requests.post(f"{untrained.url}/infer/{model}?image={CASE}", data={"params": "{}"}, timeout=60)
        assert answer.status_code == 503
        assert "run a round" in answer.json()["detail"]


def test_status_page(untrained: Any) -> None:
    page = requests.get(f"{untrained.url}/aslseg/", timeout=60)
    assert page.ok
    assert "No round has run yet" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "broken.nii.gz: cannot be read as an image" in page.text, "handed out it was not, so the page says why"
    assert requests.get(f"{untrained.url}/aslseg/status", timeout=60).json()["cases"]["total"] == 4


def test_ohif_and_its_settings_are_served(untrained: Any) -> None:
    assert "<html" in requests.get(f"{untrained.url}/ohif/", timeout=60).text.lower()
    folder = Path(monailabel.__file__).parent / "endpoints" / "static" / "ohif"
    bundle = next(f for f in folder.glob("*.js") if MARK.encode() in f.read_bytes())
    answer = requests.get(f"{untrained.url}/ohif/{bundle.name}", timeout=60)
    assert answer.headers["content-type"].startswith("text/javascript")
    assert "params['label'] = currentLabel" in answer.text


def test_reload_leaves_the_server_whole(untrained: Any) -> None:
    assert requests.post(f"{untrained.url}/reload", timeout=60).ok
    assert untrained.client().next_sample("random", {})["id"]
    assert list(untrained.client().info()["models"]) == ["sam", "sam_2d"]


def test_broken_scan_is_told_not_fatal(untrained: Any) -> None:
    answer = requests.post(f"{untrained.url}/infer/sam?image=broken", data={"params": "{}"}, timeout=60)
    assert answer.status_code == 422
    assert "broken.nii.gz" in answer.json()["detail"]


def test_session_upload_of_slicer(untrained: Any) -> None:
    path = Path(untrained.studies) / f"{CASE}.nii.gz"
    client = untrained.client()
    session = client.create_session(str(path))["session_id"]
    point = centre_of(truth(untrained) > 0)
    file, _ = client.infer("sam", CASE, {"label": "liver", "foreground": [point]}, session_id=session)
    assert Path(file).stat().st_size > 0
    assert client.get_session(session)
    client.remove_session(session)
    answer = requests.post(f"{untrained.url}/infer/sam?session_id={session}", data={"params": "{}"}, timeout=60)
    assert answer.status_code == 404


def test_exact_request_of_ohif_point_prompts(untrained: Any) -> None:
    """No `label`, raw encoding, `output=image`; the voxels behind the header are read as they are."""
    liver = truth(untrained) > 0
    point = centre_of(liver)
    params = {"foreground": [point], "background": [], "result_extension": ".nrrd", "result_dtype": "uint8"}
    params |= {"result_compress": False, "restore_label_idx": False}
    answer = requests.post(
        f"{untrained.url}/infer/sam?image={CASE}&output=image",
        data={"params": json.dumps(params)},
        timeout=60,
    )
    assert answer.ok
    _, _, voxels = answer.content.partition(b"\n\n")
    mask = np.frombuffer(voxels, np.uint8).reshape(liver.shape, order="F")
    assert mask[tuple(point)] == 1


def test_exact_request_of_slicer_roi(untrained: Any) -> None:
    """Pairs per axis, unsorted for LPS volumes, partly outside; no points; mm slice."""
    params = {"label": "liver", "roi": [40, 5, 44, -6, 18, 2], "slice": 800, "result_extension": ".nrrd"}
    _, result = untrained.client().infer("sam", CASE, {**params, "result_dtype": "uint8", "reset_state": True})
    assert result["source"] == "clicks"


def test_upload_a_scan_then_click(untrained: Any, tmp_path: Path) -> None:
    scan = nib.load(Path(untrained.studies) / f"{CASE}.nii.gz")
    flipped = tmp_path / "uploaded.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[::-1], scan.affine @ np.diag([-1, 1, 1, 1])), flipped)
    client = untrained.client()
    client.upload_image(str(flipped), "uploaded")
    point = centre_of(truth(untrained)[::-1] > 0)
    file, _ = client.infer("sam", "uploaded", {"label": "liver", "foreground": [point]})
    assert Path(file).stat().st_size > 0
    assert requests.delete(f"{untrained.url}/datastore/image?id=uploaded", timeout=60).ok
    assert "uploaded" not in client.datastore()["objects"]
