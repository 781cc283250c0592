"""What the machine refuses is a 503 or 507 that says so: the client may send the same again."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from fastapi import APIRouter, FastAPI, File, HTTPException, UploadFile
from starlette.testclient import TestClient

from aslseg.errors import DiskFullError, FileWriteError, NoResourcesError
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.kept_files import KeptFiles
from aslseg.serving.routes import answer_errors, pages
from aslseg.settings import load_settings

LARGE = {"file": ("scan.nii", bytes(2_000_000))}  # a file of a megabyte and more is put on the disk before it is used


def client(error: Exception | None = None) -> TestClient:
    host = FastAPI()

    @host.put("/scan")
    def scan(file: UploadFile = File(...)) -> int:  # noqa: B008 - FastAPI's form
        if error is not None:
            raise error
        return len(file.file.read())

    answer_errors(host)
    return TestClient(host, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("error", "status", "text", "later"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 507, "full; free some space there and send it again", False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 507, "What was stored stays as it is", False),
        (OSError(errno.EIO, "Input/output error"), 503, "(Input/output error); check its disk", False),
        (DiskFullError("disk full while writing x"), 507, "disk full while writing x", False),
        (FileWriteError("x cannot be written"), 503, "x cannot be written", False),
        (NoResourcesError("the server reads 4 other files"), 503, "reads 4 other files", True),
        (RefusedError("the datastore is locked", 503), 503, "the datastore is locked", True),
        (RefusedError("no such scan", 404), 404, "no such scan", False),
        (OSError(errno.ENAMETOOLONG, "File name too long"), 400, "no file can have the name", False),
        (OSError(errno.EINVAL, "Invalid argument"), 400, "no file can have the name", False),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), 400, "no file can have the name", False),
        (requests.ConnectionError("refused"), 502, "the PACS does not answer (ConnectionError)", False),
        (HTTPException(418, "another answer"), 418, "another answer", False),
    ],
)
def test_status_and_when_to_try_again(error: Exception, status: int, text: str, later: bool) -> None:
    answer = client(error).put("/scan", files=LARGE)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, "30" if later else None)
    assert text in answer.json()["detail"]


def test_an_address_that_no_file_can_have_is_not_there() -> None:
    host, router = FastAPI(), APIRouter()
    pages.add_routes(router, SimpleNamespace(settings=load_settings({}, env={})[0]))  # type: ignore[arg-type]
    host.include_router(router)
    answer_errors(host)
    client = TestClient(host, raise_server_exceptions=False)
    for path in ("a" * 300, "a%00b", "b/" * 3000):
        answer = client.get(f"/ohif/{path}")
        assert (answer.status_code, "no file can have the name" in answer.json()["detail"]) == (404, True)


def test_a_pacs_that_is_down_while_a_label_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "label.bin"
    source.write_bytes(b"MY DRAWING")
    kept = KeptFiles(tmp_path / "home")
    with (
        pytest.raises(RefusedError, match=r"PACS does not answer.*kept as parked/1\.2-") as refused,
        kept.parked("1.2", source, {}),
    ):
        raise requests.ConnectionError("refused")
    assert refused.value.status == 502


def test_an_upload_that_cannot_be_put_on_the_disk_is_not_called_malformed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert client().put("/scan", files=LARGE).json() == 2_000_000
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    answer = client().put("/scan", files=LARGE)
    assert (answer.status_code, "No such file" in answer.json()["detail"]) == (503, True)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    answer = client().put("/scan", files=LARGE)
    assert (answer.status_code, "free some space" in answer.json()["detail"]) == (507, True)
    assert (
        client().put("/scan", content=b"no form at all", headers={"content-type": "multipart/form-data"}).status_code
        == 400
    )
