"""What a hostile or careless client can send: one clear 4xx each, nothing outside the studies folder, server alive."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nibabel as nib
import numpy as np
import pytest
import requests

CASE = "phantom_001"
NAMES = [
    *("../x", "..%2fx", "%252e%252e", "/etc/passwd", "C:\\x", "\\\\host\\x", "nul\0", "new\nline", "x" * 300),
    *("..", ".", ".hidden", "🙂", "a\u202eb", "trailing ", "a/b"),
]


def tree(root: Path) -> dict[str, str]:
    """Every file outside the studies folder, by hash."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_relative_to(root / "studies"):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def sentinel(untrained: Any) -> Any:
    """Checks that nothing beside the studies folder changed, and that the server still answers."""
    root = Path(untrained.studies).parent
    before, listed = tree(root), sorted(os.listdir(root))
    yield
    assert (tree(root), sorted(os.listdir(root))) == (before, listed)
    assert requests.get(f"{untrained.url}/info/", timeout=60).json()["name"] == "ASLseg"


@pytest.fixture
def label(tmp_path: Path, untrained: Any) -> Path:
    scan = nib.load(Path(untrained.studies) / f"{CASE}.nii.gz")
    path = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(scan.shape, np.uint8), scan.affine), path)
    return path


def refused(answer: requests.Response) -> str:
    """The message of a 4xx."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    detail = answer.json()["detail"]
    return detail if isinstance(detail, str) else json.dumps(detail)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_tags(untrained: Any, sentinel: None, label: Path, name: str) -> None:
    url, quoted = untrained.url, quote(name, safe="")
    scan = (Path(untrained.studies) / f"{CASE}.nii.gz").read_bytes()

    def put(where: str, part: str, content: bytes) -> requests.Response:
        return requests.put(f"{url}{where}", files={part: ("x.nii.gz", content)}, data={"params": "{}"}, timeout=60)

    assert refused(put(f"/datastore/image?image={quoted}", "file", scan))
    assert refused(put(f"/datastore/label?image={CASE}&tag={quoted}", "label", label.read_bytes()))
    assert refused(put(f"/datastore/label?image={quoted}", "label", label.read_bytes()))
    assert refused(requests.post(f"{url}/infer/sam?image={quoted}", data={"params": "{}"}, timeout=60))
    assert refused(requests.post(f"{url}/infer/sam?session_id={quoted}", data={"params": "{}"}, timeout=60))
    assert refused(requests.delete(f"{url}/datastore/image?id={quoted}", timeout=60))
    assert refused(requests.delete(f"{url}/datastore/label?id={CASE}&tag={quoted}", timeout=60))
    assert refused(requests.delete(f"{url}/datastore/label?id={quoted}&tag=final", timeout=60))
    assert refused(requests.get(f"{url}/datastore/image?image={quoted}", timeout=60))
    assert refused(requests.get(f"{url}/datastore/label?label={quoted}&tag=final", timeout=60))
    assert refused(requests.get(f"{url}/datastore/label?label={CASE}&tag={quoted}", timeout=60))
    assert refused(requests.put(f"{url}/datastore/image/info?image={quoted}", data={"info": "{}"}, timeout=60))
    for route in ("infer", "activelearning", "train"):
        if "/" not in name and name not in (".", ".."):
            assert refused(requests.post(f"{url}/{route}/{quoted}", data={"params": "{}"}, timeout=60))


@pytest.mark.parametrize(
    "params",
    [
        {"image": "/etc/passwd"},
        {"model": "ssl"},
        {"model_filename": "../../x.pt"},
        {"label": "/etc/passwd" * 50},
        {"save_label": True, "label_tag": "final"},
        {"save_label": True, "label_tag": "aslseg_pseudo"},
        {"save_label": True, "label_tag": "../../x"},
        {"device": "cuda:99"},
        {"timeout": 1e9},
        {"logging": "DEBUG"},
        {"result_extension": ".sh"},
        {"result_dtype": "object"},
        {"foreground": [[0, 0]]},
        {"foreground": [["a", "b", "c"]]},
        {"foreground": [[0, 0, 0]] * 1_000_000},
        {"foreground": {"a": 1}},
        {"roi": [1, 2, 3]},
        {"slice": "ten"},
        {"points": [[1, 2, 3]], "point_labels": []},
        {"label_prompt": "all"},
    ],
)
def test_params(untrained: Any, sentinel: None, params: dict[str, Any]) -> None:
    data = {"params": json.dumps(params)}
    assert refused(requests.post(f"{untrained.url}/infer/sam?image={CASE}", data=data, timeout=60))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"foreground": [[NaN, 0, 0]]}',
        '{"a": 1, "a": 2}',
        '{"x":' * 5000 + "1" + "}" * 5000,
    ],
)
def test_json(untrained: Any, sentinel: None, text: str) -> None:
    assert refused(requests.post(f"{untrained.url}/infer/sam?image={CASE}", data={"params": text}, timeout=60))


@pytest.mark.parametrize("params", [{"roi": [50, -9, 99, -5, 1e9, -1e9]}, {"foreground": [[-5, 0, 1e9]], "slice": -5}])
def test_prompts_outside_the_volume_are_left_out(untrained: Any, sentinel: None, params: dict[str, Any]) -> None:
    answer = requests.post(f"{untrained.url}/infer/sam?image={CASE}", data={"params": json.dumps(params)}, timeout=60)
    assert answer.ok


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.nii.gz", b"junk"),
        ("x.nii.gz", b""),
        ("x.nii.gz", b"\x1f\x8b\x08\x00junk"),
        (
            "x.nrrd",
            b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 9 9 9\nencoding: raw\ndata file: /etc/passwd\n\n",
        ),
        (
            "x.mhd",
            b"ObjectType = Image\nNDims = 3\nDimSize = 9 9 9\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n",
        ),
        ("x.pt", b"\x80\x04cposix\nsystem\n(S'touch /tmp/aslseg-sentinel'\ntR."),
        ("x.sh", b"#!/bin/sh\n"),
        ("../../x.sh", b"#!/bin/sh\n"),
        ("", b"x"),
    ],
)
def test_uploads(untrained: Any, sentinel: None, name: str, content: bytes) -> None:
    url = untrained.url
    for where, part in (("/infer/sam", "file"), (f"/infer/sam?image={CASE}", "label")):
        if part == "file":
            answer = requests.post(f"{url}{where}", files={part: (name, content)}, data={"params": "{}"}, timeout=60)
            assert refused(answer)
    assert refused(
        requests.put(
            f"{url}/datastore/image?image=up",
            files={"file": (name, content)},
            data={"params": "{}"},
            timeout=60,
        )
    )
    saved = requests.put(
        f"{url}/datastore/label?image={CASE}",
        files={"label": (name, content)},
        data={"params": "{}"},
        timeout=60,
    )
    assert refused(saved)
    assert not Path("/tmp/aslseg-sentinel").exists()


def test_a_label_that_does_not_fit_is_kept_and_told(untrained: Any, sentinel: None, tmp_path: Path) -> None:
    path = tmp_path / "wrong.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), path)
    answer = requests.put(
        f"{untrained.url}/datastore/label?image={CASE}",
        files={"label": ("wrong.nii.gz", path.read_bytes())},
        data={"params": json.dumps({"label_info": [{"name": "liver", "idx": 1}]})},
        timeout=60,
    )
    message = refused(answer)
    assert "shape" in message
    kept = Path(untrained.studies) / ".aslseg" / message.rsplit(" as ", 1)[1]
    assert kept.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("PUT", "/model/ssl"),
        ("DELETE", "/model/ssl"),
        ("POST", "/infer/wsi/ssl?image=/etc/passwd"),
        ("POST", "/infer/wsi_v2/ssl?image=/etc/passwd"),
        ("PUT", "/session/?uncompress=true"),
        ("GET", "/session/..%2f..%2fx"),
        ("DELETE", "/session/.."),
        ("POST", "/train/../../x"),
        ("POST", "/scoring/none"),
    ],
)
def test_other_routes(untrained: Any, sentinel: None, method: str, where: str) -> None:
    files = {"files": ("x.tar", b"x")} if "session" in where else {"file": ("x.pt", b"x")}
    request = requests.Request(method, f"{untrained.url}{where}", files=files if method == "PUT" else None).prepare()
    request.url = f"{untrained.url}{where}"
    answer = requests.Session().send(request, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text[:300]


def test_nothing_is_left_in_the_temporary_folder(untrained: Any, sentinel: None) -> None:
    scan = (Path(untrained.studies) / f"{CASE}.nii.gz").read_bytes()
    for content in (scan, b"junk"):
        files = {"file": ("x.nii.gz", content)}
        requests.post(f"{untrained.url}/infer/sam", files=files, data={"params": "{}"}, timeout=60)
    end = time.monotonic() + 30  # files go once the reply has left, which may be after it has come
    while (left := list((untrained.folder / "tmp").glob("aslseg-*"))) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
