"""Requests of foreign pages, under foreign names, and uploads that stall are refused before anything reads them."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterable
from typing import Any

import pytest
from fastapi import FastAPI, File, Form, UploadFile
from starlette.datastructures import Headers
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from aslseg.errors import BadSettingsError
from aslseg.serving.guard import RequestGuard, install_guard
from aslseg.serving.network_access import bound_host, require_safe_exposure
from aslseg.settings import load_settings


def guarded(**conf: str) -> TestClient:
    """A client of an application with the guard, which is called ``seg.example``."""
    host = FastAPI()

    @host.get("/read")
    @host.put("/change")
    @host.delete("/change")
    def answer() -> str:
        return "done"

    @host.post("/session/")
    def upload(file: UploadFile = File(...)) -> int:  # noqa: B008 - FastAPI's form
        return len(file.file.read())

    @host.post("/points")
    @host.post("/batch/infer/points")
    def points(params: dict[str, Any]) -> int:
        return len(params["foreground"])

    @host.post("/form")
    def form(params: str = Form()) -> int:
        return len(params)

    install_guard(host, load_settings({"hosts": "seg.example", **conf}, env={})[0])
    return TestClient(host, base_url="http://seg.example")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://seg.example.evil.example"},
        {"origin": "http://seg.example:8080"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_foreign_pages_change_nothing(method: str, headers: dict[str, str]) -> None:
    answer = guarded().request(method, "/change", headers=headers)
    assert answer.status_code == 403
    assert "refused" in answer.json()["detail"]
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_preflight_from_a_foreign_page_allows_nothing(method: str) -> None:
    asked = {"origin": "http://evil.example", "access-control-request-method": method}
    answer = guarded().options("/change", headers=asked)
    assert not answer.is_success
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("headers", [{}, {"origin": "http://seg.example"}, {"sec-fetch-site": "same-origin"}])
def test_own_pages_and_programs_pass(headers: dict[str, str]) -> None:
    assert guarded().put("/change", headers=headers).json() == "done"


def test_an_origin_can_be_allowed() -> None:
    client, viewer = guarded(origins="https://viewer.example, https://other.example/"), "https://viewer.example"
    assert client.put("/change", headers={"origin": viewer}).headers["access-control-allow-origin"] == viewer
    asked = {"origin": viewer, "access-control-request-method": "PUT"}
    assert client.options("/change", headers=asked).is_success
    other = client.put("/change", headers={"origin": "https://other.example"})
    assert other.headers["access-control-allow-origin"] == "https://other.example"
    assert client.put("/change", headers={"origin": "http://viewer.example"}).status_code == 403


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("seg.example", True),
        ("SEG.example:8000", True),
        ("localhost:8000", True),
        (socket.gethostname(), True),
        ("127.0.0.1:8000", True),
        ("10.1.2.3", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[::1", False),
    ],
)
def test_names_of_the_server(host: str, known: bool) -> None:
    guard = RequestGuard(FastAPI(), hosts=["seg.example"])
    refusal = guard.refusal("GET", Headers({"host": host}))
    assert (refusal is None) == known
    if refusal is not None:
        assert refusal[0] == 400
        assert "hosts" in refusal[1]


def test_large_requests_are_refused_by_their_header_and_by_their_bytes() -> None:
    client = guarded(max_upload_gb="1e-6")
    assert client.post("/session/", files={"file": b"x" * 2000}).status_code == 413

    def pieces() -> Iterable[bytes]:
        yield from (b"x" * 500 for _ in range(4))

    chunked = client.post("/session/", content=pieces(), headers={"content-type": "multipart/form-data; boundary=b"})
    assert chunked.status_code == 413
    assert client.post("/session/", files={"file": b"x" * 300}).json() == 300


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("application/json", "/points"),
        ("text/plain", "/points"),
        ("", "/points"),
        ("multipart/form-data; boundary=b", "/points"),
        ("multipart/form-data; boundary=b", "/batch/infer/points"),
        ("application/x-www-form-urlencoded", "/form"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_without_files_is_small(kind: str, path: str, chunked: bool) -> None:
    body = b'{"foreground": [' + b"1," * 1_000_000 + b"1]}"
    content = iter([body[:1_000_000], body[1_000_000:]]) if chunked else body
    answer = guarded().post(path, content=content, headers={"content-type": kind})
    assert answer.status_code == 413
    assert "multipart/form-data" in answer.json()["detail"]


def test_files_may_be_larger() -> None:
    assert guarded().post("/session/", files={"file": b"x" * 3_000_000}).json() == 3_000_000


def test_ten_thousand_points_fit() -> None:
    points = [[n / 7, n / 11, n / 13] for n in range(10_000)]
    client = guarded()
    assert client.post("/points", json={"foreground": points}).json() == 10_000
    assert client.post("/form", data={"params": json.dumps(points)}).json() > 500_000


def asked(host: Any, method: str, path: str, messages: list[dict[str, Any]], pause: float = 0.0) -> list[Any]:
    """What an application sends to a client with a pause in seconds before each message, and silent after them."""
    sent: list[Any] = []
    left = [{"type": "http.request"} | message for message in messages]

    async def receive() -> Any:
        if left:
            await asyncio.sleep(pause)
            return left.pop(0)
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1)}
    asyncio.run(host(scope, receive, send))
    return sent


@pytest.mark.parametrize(("pieces", "pause"), [([], 0.0), ([b"--b\r\n"], 0.0), ([b"-"] * 1000, 0.02)])
def test_an_upload_that_stalls_is_dropped(pieces: list[bytes], pause: float) -> None:
    host = FastAPI()

    @host.post("/session/")
    def upload(file: UploadFile = File(...)) -> int:  # noqa: B008 - FastAPI's form
        return 0

    host.add_middleware(RequestGuard, stall_seconds=0.05)
    sent = asked(host, "POST", "/session/", [{"body": piece, "more_body": True} for piece in pieces], pause)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert b"stalled" in sent[1]["body"]


def test_an_archive_that_takes_long_to_build_is_sent_whole() -> None:
    host = FastAPI()

    @host.get("/datastore/dataset")
    def dataset() -> StreamingResponse:
        time.sleep(0.1)
        return StreamingResponse(iter([b"head", b"tail"]))

    host.add_middleware(RequestGuard, stall_seconds=0.05)
    sent = asked(host, "GET", "/datastore/dataset", [{"body": b"", "more_body": False}])
    assert sent[0]["status"] == 200
    assert b"".join(message["body"] for message in sent[1:]) == b"headtail"


def test_what_the_server_does_between_two_parts_is_no_delay_of_the_sender() -> None:
    parts: list[bytes] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            parts.append((await receive())["body"])
            time.sleep(0.1)

    messages = [{"body": b"a", "more_body": True}, {"body": b"b", "more_body": False}]
    asked(RequestGuard(slow, stall_seconds=0.05), "POST", "/session/", messages)
    assert parts == [b"a", b"b"]


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        (["start_server", "--app", "a", "--host", "127.0.0.1"], "127.0.0.1"),
        (["start_server", "-i", "10.0.0.1", "--port", "1"], "10.0.0.1"),
        (["start_server", "--host=::1"], "::1"),
        (["start_server", "--app", "a"], "0.0.0.0"),
        (["tests/"], "127.0.0.1"),
    ],
)
def test_the_address_that_the_server_was_told(arguments: list[str], host: str) -> None:
    assert bound_host(arguments) == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "seg.example"])
def test_no_network_without_authentication(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONAI_LABEL_AUTH_ENABLE", raising=False)
    with pytest.raises(BadSettingsError, match=r"--host 127\.0\.0\.1.*token_file.*insecure true"):
        require_safe_exposure(host, load_settings({}, env={})[0])
    for conf in ({"insecure": "true"}, {"token_file": "tokens"}):
        require_safe_exposure(host, load_settings(conf, env={})[0])
    monkeypatch.setenv("MONAI_LABEL_AUTH_ENABLE", "True")
    require_safe_exposure(host, load_settings({}, env={})[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_no_authentication(host: str) -> None:
    require_safe_exposure(host, load_settings({}, env={})[0])
