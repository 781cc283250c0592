"""What the running server gives away or loses: nothing, to foreign pages, odd requests and careless clients."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.params import MAX_POINTS

CASE = "phantom_001"
DEEP = "[" * 100_000


def message(answer: requests.Response, status: int) -> str:
    assert answer.status_code == status, answer.text[:300]
    return str(answer.json()["detail"])


def put_label(server: Any, content: bytes, name: str = "label.nii.gz", tag: str = "final") -> requests.Response:
    files = {"label": (name, content)}
    return requests.put(
        f"{server.url}/datastore/label?image={CASE}&tag={tag}", files=files, data={"params": "{}"}, timeout=60
    )


@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/train/round"), ("DELETE", f"/datastore/image?id={CASE}"), ("PUT", f"/datastore/label?image={CASE}")],
)
def test_a_foreign_page_starts_and_deletes_nothing(untrained: Any, origin: str, method: str, path: str) -> None:
    answer = requests.request(method, untrained.url + path, headers={"Origin": origin}, timeout=60)
    assert "origins" in message(answer, 403)
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    preflight = requests.options(untrained.url + path, headers=asked, timeout=60)
    assert not preflight.ok
    assert "Access-Control-Allow-Origin" not in preflight.headers
    assert (Path(untrained.studies) / f"{CASE}.nii.gz").exists()


def test_a_name_that_somebody_else_made_point_here(untrained: Any) -> None:
    answer = requests.get(f"{untrained.url}/datastore/", headers={"Host": "evil.example"}, timeout=60)
    assert "evil.example" in message(answer, 400)


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", f"/infer/sam?image={CASE}", {"data": {"params": '{"device": [["x"]]}'}}, 400),
        ("POST", f"/infer/sam?image={CASE}", {"data": {"params": '{"client_id": [[1]]}'}}, 400),
        ("POST", f"/infer/sam?image={CASE}", {"data": {"params": DEEP}}, 400),
        ("POST", "/activelearning/random", {"json": {"client_id": [[1]]}}, 400),
        ("PUT", f"/datastore/image/info?image={CASE}", {"data": {"info": "[]"}}, 400),
        ("PUT", f"/datastore/image/info?image={CASE}", {"data": {"info": DEEP}}, 400),
        ("PUT", f"/datastore/image/info?image={CASE}", {"data": {"info": '{"a": "\\ud800"}'}}, 400),
        ("PUT", f"/datastore/image/info?image={CASE}", {"data": {"info": '{"a": 1e999}'}}, 400),
        ("PUT", f"/datastore/label/info?label={CASE}&tag=final", {"data": {"info": "null"}}, 400),
        ("PUT", f"/datastore/image/info?image={CASE}", {"data": {"info": '{"user": {"x": 1}}'}}, 400),
        ("PUT", f"/datastore/image/info?image={CASE}", {"data": {"info": '{"client_id": [1]}'}}, 400),
        ("PUT", f"/datastore/updatelabelinfo?label={CASE}&tag=final", {"data": {"params": "7"}}, 400),
        ("GET", "/proxy/dicom/wado/studies", {}, 404),
        ("POST", "/proxy/dicom/wado/studies", {"data": b"x"}, 404),
        ("GET", "/logs/gpu", {}, 404),
        ("GET", "/docs", {}, 404),
        ("POST", "/train/", {}, 400),
        ("POST", "/batch/infer/sam", {"json": {"images": [[1]]}}, 400),
        ("POST", "/batch/infer/sam", {"json": {"label_tag": "../x"}}, 400),
    ],
)
def test_requests_that_once_failed_in_the_server(
    untrained: Any, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    answer = requests.request(method, untrained.url + path, timeout=60, **options)
    assert answer.status_code == status, answer.text[:300]
    assert requests.get(f"{untrained.url}/train/?check_if_running=true", timeout=60).status_code == 404


def test_many_points_are_bounded(untrained: Any) -> None:
    points = [[n % 50, n // 50, 12] for n in range(MAX_POINTS + 1)]
    params = {"params": json.dumps({"foreground": points})}
    assert f"{MAX_POINTS}" in message(
        requests.post(f"{untrained.url}/infer/sam_2d?image={CASE}", data=params, timeout=60), 413
    )


@pytest.mark.parametrize(
    ("name", "tag"),
    [("label.nii.gz", "original"), ("label.nii.gz", "final"), ("label.bin", "final"), ("label.bin", "x")],
)
def test_what_is_no_label_is_refused_under_every_tag_and_kept(untrained: Any, name: str, tag: str) -> None:
    content = f"not a label, {name} {tag}".encode()
    text = message(put_label(untrained, content, name, tag), 422)
    kept = Path(untrained.studies) / ".aslseg" / text.rsplit(" as ", 1)[1]
    assert kept.read_bytes() == content
    labels = requests.get(f"{untrained.url}/datastore/?output=all", timeout=60).json()["objects"][CASE]["labels"]
    assert tag not in labels


def test_tags_in_other_letters(untrained: Any) -> None:
    assert "save under 'final'" in message(put_label(untrained, b"x", tag="Final"), 409)


def test_a_held_lock_stops_saving_and_nothing_else(untrained: Any) -> None:
    lock = Path(untrained.studies) / ".lock"
    held = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); input()"
    scan = nib.load(Path(untrained.studies) / f"{CASE}.nii.gz")
    drawn = nib.Nifti1Image(np.ones(scan.shape, np.uint8), scan.affine).to_bytes()
    command = [sys.executable, "-c", held, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        Path(untrained.studies, "later.nii").write_bytes(b"seen when the lock is free")
        assert requests.get(f"{untrained.url}/info/", timeout=60).json()["datastore"]["total"] == 4
        assert f"process {holder.pid}" in message(put_label(untrained, drawn, "label.nii"), 503)
        assert requests.get(f"{untrained.url}/aslseg/health", timeout=60).status_code == 503
        holder.communicate(b"\n")
    assert requests.get(f"{untrained.url}/info/", timeout=60).json()["datastore"]["total"] == 5
    Path(untrained.studies, "later.nii").unlink()
    assert requests.get(f"{untrained.url}/aslseg/health", timeout=60).json()["status"] == "ok"


def test_a_deleted_label_is_in_the_trash_and_downloads_leave_nothing(untrained: Any) -> None:
    assert "no scan has a human label" in message(requests.get(f"{untrained.url}/datastore/dataset", timeout=60), 404)
    scan = nib.load(Path(untrained.studies) / f"{CASE}.nii.gz")
    raw = np.zeros(scan.shape, np.uint8)
    raw[20, 20, 12] = 1
    assert put_label(untrained, raw.tobytes(order="F"), "label.bin").ok
    for _ in range(2):
        answer = requests.get(f"{untrained.url}/datastore/dataset", timeout=60)
        with zipfile.ZipFile(BytesIO(answer.content)) as archive:
            assert set(archive.namelist()) == {f"image/{CASE}.nii.gz", f"label/{CASE}.nii.gz", "metadata.json"}
    with requests.get(f"{untrained.url}/datastore/dataset", timeout=60, stream=True) as broken_off:
        assert broken_off.ok
    label = Path(untrained.studies, "labels", "final", f"{CASE}.nii.gz").read_bytes()
    assert requests.delete(f"{untrained.url}/datastore/label?id={CASE}&tag=final", timeout=60).ok
    home = Path(untrained.studies) / ".aslseg"
    event = Ledger(home / "ledger.sqlite").events(kinds=("deleted",))[-1]
    assert (event.case, event.tag) == (CASE, "final")
    assert (home / event.details["trash"]).read_bytes() == label
    # what was broken off is cleared up by the server in its own time; other requests leave files of other names
    end = time.monotonic() + 30
    while left := [p for p in (untrained.folder / "tmp").iterdir() if p.suffix == ".zip" or p.name[:7] == "aslseg-"]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_health_metrics_and_the_way_in(untrained: Any) -> None:
    assert requests.get(untrained.url, timeout=60).url == f"{untrained.url}/aslseg/"
    health = requests.get(f"{untrained.url}/aslseg/health", timeout=60)
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert requests.post(f"{untrained.url}/infer/sam?image={CASE}", data={"params": "{}"}, timeout=60).ok
    counted, end = (
        'aslseg_request_seconds_count{method="POST",route="/infer/{model}",status="200"}',
        time.monotonic() + 60,
    )
    while counted not in (metrics := requests.get(f"{untrained.url}/aslseg/metrics", timeout=60)).text:
        assert time.monotonic() < end, metrics.text  # a request is counted once its answer is out
        time.sleep(0.1)
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'aslseg_stage_seconds_count{model="sam",stage="total"}' in metrics.text
    assert CASE not in metrics.text + health.text
