"""What the machine refuses is a 503 or 507 that says so: the client may send the same again."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, File, HTTPException, UploadFile
from starlette.testclient import TestClient

from aslseg.errors import DiskFullError, FileWriteError, NoResourcesError
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.routes import answer_errors

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
        (HTTPException(418, "another answer"), 418, "another answer", False),
    ],
)
def test_status_and_when_to_try_again(error: Exception, status: int, text: str, later: bool) -> None:
    answer = client(error).put("/scan", files=LARGE)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, "30" if later else None)
    assert text in answer.json()["detail"]


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
