"""A label that comes with something that the server refuses: the drawing is kept, whatever is wrong with the rest."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.routes import answer_errors
from aslseg.serving.routes.datastore import add_routes
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.settings import Paths, load_settings

SETTINGS, _ = load_settings({"min_free_gb": "0"}, env={})


@pytest.fixture
def store(tmp_path: Path) -> StudiesDatastore:
    root = tmp_path / "studies"
    root.mkdir()
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.eye(4)), root / "case0.nii.gz")
    return StudiesDatastore(str(root), SETTINGS, Paths(SETTINGS, root))


@pytest.fixture
def client(store: StudiesDatastore) -> TestClient:
    app = SimpleNamespace(
        datastore=lambda: store, leases=SimpleNamespace(release=lambda _: None), on_save_label=lambda *_: None
    )
    host, router = FastAPI(), APIRouter()
    add_routes(router, app)  # type: ignore[arg-type]
    host.include_router(router)
    answer_errors(host)
    return TestClient(host, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("query", "name", "params", "status", "kept_as"),
    [
        ("image=case0", "label.nii.gz", "not json", 400, "case0"),
        ("image=case0", "label.nii.gz", '{"x": NaN}', 400, "case0"),
        ("image=case0", "label.nii.gz", "[1]", 400, "case0"),
        ("image=case0", "label.nii.gz", json.dumps({"client_id": "a" * 300}), 400, "case0"),
        ("image=case0", "label.nii.gz", '{"client_id": [1]}', 400, "case0"),
        ("image=case0", "label.xyz", "{}", 422, "case0"),
        ("image=case0&tag=..%2Fevil", "label.nii.gz", "{}", 400, "case0"),
        ("image=..%2Fevil", "label.nii.gz", "{}", 400, "unknown"),
        ("image=..%2Fevil", "label.nii.gz", "not json", 400, "unknown"),
        ("", "label.nii.gz", "{}", 400, "unknown"),
    ],
)
def test_the_drawing_is_kept(
    client: TestClient, store: StudiesDatastore, query: str, name: str, params: str, status: int, kept_as: str
) -> None:
    files = {"label": (name, b"MY DRAWING")}
    answer = client.put(f"/datastore/label?{query}", files=files, data={"params": params})
    assert answer.status_code == status
    about, kept = sorted((store.kept.home / "parked").iterdir(), key=lambda p: p.suffix != ".json")
    assert kept.read_bytes() == b"MY DRAWING"
    assert kept.name.startswith(f"{kept_as}-")
    assert kept.name.endswith(".nii.gz" if name == "label.nii.gz" else ".bin")
    assert f"Your upload is kept as parked/{kept.name}" in answer.json()["detail"]
    assert json.loads(about.read_text())["reason"].rstrip(".") in answer.json()["detail"]
    refused = Ledger(store.kept.home / "ledger.sqlite").events(kinds=("refused",))
    assert [e.case for e in refused] == [kept_as]


def test_nothing_is_kept_where_the_disk_is_away(client: TestClient, store: StudiesDatastore) -> None:
    store.root.rename(store.root.with_name("away"))
    store.root.mkdir()
    for params in ("not json", "{}"):
        files = {"label": ("label.nii.gz", b"MY DRAWING")}
        answer = client.put("/datastore/label?image=case0", files=files, data={"params": params})
        assert (answer.status_code, "nothing that was sent is kept" in answer.json()["detail"]) == (503, True)
        assert "retry-after" in answer.headers
    assert list(store.root.iterdir()) == []
