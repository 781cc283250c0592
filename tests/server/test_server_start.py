"""Starting: wrong settings end it with exit code 2, everything else does not stop it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from aslseg.rounds.ledger.ledger import Entry, Ledger


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ({"ssl_iteration": "5"}, "did you mean 'ssl_iterations'?"),
        ({"overlap": "lots"}, "overlap: "),
        ({"labels": "tumour,liver", "nested": ""}, "tumour has the value 2 in the label files of"),
    ],
)
def test_wrong_setting_ends_with_exit_code_2(
    serve: Callable[..., Any], tmp_path: Path, conf: dict[str, str], said: str
) -> None:
    (tmp_path / "studies" / "labels" / "final").mkdir(parents=True)
    (tmp_path / "studies" / "labels" / "final" / "a.nii.gz").write_bytes(b"drawn with these values:")
    ledger = Ledger(tmp_path / "studies" / ".aslseg" / "ledger.sqlite")
    ledger.append([Entry("opened", 1, details={"settings": {"labels": ["liver", "tumour"]}})])
    server = serve(tmp_path / "studies", **conf)
    assert server.process.wait(300) == 2
    assert f"ASLseg does not start: {'unknown' if 'mean' in said else ''}" in server.log
    assert said in server.log
    assert "Traceback" not in server.log


def test_starts_with_everything_in_its_way(serve: Callable[..., Any], tmp_path: Path) -> None:
    """No scan, a half-written JSON file, junk, a session folder without description, a PATH without .venv/bin."""
    studies = tmp_path / "studies"
    (studies / ".aslseg" / "sessions" / "halfway").mkdir(parents=True)
    (studies / "datastore_v2.json").write_text('{"name": "new-da')
    (studies / "junk.nii.gz").write_bytes(b"junk")
    server = serve(studies, env={"PATH": "/usr/bin:/bin"}).wait()
    assert requests.get(f"{server.url}/info/", timeout=60).json()["datastore"]["total"] == 1
    assert "label one scan" in server.log
    server.stop()


def test_starts_on_a_pacs_that_does_not_answer(serve: Callable[..., Any], tmp_path: Path) -> None:
    """And finds dcmqi's converter without it being on PATH, so that nothing is downloaded."""
    server = serve("http://127.0.0.1:9/dicom-web", env={"PATH": "/usr/bin:/bin"}).wait()
    found = requests.get(f"{server.url}/info/", timeout=60).json()
    assert found["datastore"]["total"] == 0
    assert list(found["models"]) == ["sam", "sam_2d"]
    answer = requests.post(f"{server.url}/infer/sam?image=1.2.3", data={"params": "{}"}, timeout=60)
    assert (answer.status_code, "PACS" in answer.json()["detail"]) == (502, True)
    assert requests.post(f"{server.url}/train/round", timeout=60).ok
    server.stop()
