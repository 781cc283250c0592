"""A server on a network: it refuses to start without authentication, and with it everybody does what they may."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.tokens import ROLES, new_token_line
from aslseg.volume.phantom import write_studies
from tiny_server import TINY, TINY_SHAPE

CASE = "phantom_000"
OPEN = {"/", "/docs", "/openapi.json", "/favicon.ico", "/aslseg/health", "/auth/", "/auth/token"}


def test_it_does_not_start_on_a_network_without_authentication(serve: Callable[..., Any], tmp_path: Path) -> None:
    server = serve(tmp_path / "studies", host="0.0.0.0")
    assert server.process.wait(300) == 2
    assert "ASLseg does not start: it would listen on 0.0.0.0 without authentication" in server.log
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, str]]:
    """A server on all addresses with a token for each role."""
    folder = tmp_path_factory.mktemp("guarded")
    write_studies(folder / "studies", 2, 0, 5, shape=TINY_SHAPE)
    made = {role: new_token_line(f"{role}-1", role) for role in ROLES}
    (folder / "tokens").write_text("\n".join(line for _, line in made.values()))
    headers = {"authorization": f"Bearer {made['annotator'][0]}"}
    conf = TINY | {"first_round": "false", "token_file": str(folder / "tokens"), "log_case_ids": "hashed"}
    server = serve(folder / "studies", host="0.0.0.0", **conf).wait(headers=headers)
    return server, {role: token for role, (token, _) in made.items()}


def test_every_route_but_a_few_wants_a_token(guarded: tuple[Any, dict[str, str]]) -> None:
    server, _ = guarded
    paths = requests.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert len(paths) > 25
    for path, methods in paths.items():
        filled = path
        for name in ("model", "strategy", "method", "session_id", "path"):
            filled = filled.replace(f"{{{name}}}", "x")
        for method in methods:
            for headers in ({}, {"authorization": "Bearer junk"}, {"authorization": "Basic junk"}):
                answer = requests.request(method.upper(), server.url + filled, headers=headers, timeout=60)
                assert path in OPEN or answer.status_code == 401, (method, path, answer.status_code)


def test_every_route_asks_who_it_is_before_it_takes_a_body(guarded: tuple[Any, dict[str, str]]) -> None:
    """Only the headers are sent: an answer shows that nothing was read."""
    server, _ = guarded
    paths = requests.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    for path, methods in paths.items():
        if path in OPEN:
            continue
        for method in methods:
            head = (
                f"{method.upper()} {path.replace('{', '').replace('}', '')} HTTP/1.1\r\nHost: localhost\r\n"
                "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1500000\r\n"
                "Expect: 100-continue\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as asked:
                asked.sendall(head.encode())
                assert asked.recv(100).startswith(b"HTTP/1.1 401"), (method, path)


@pytest.mark.parametrize(
    ("method", "path", "least"),
    [
        ("GET", "/info/", "annotator"),
        ("GET", "/aslseg/", "annotator"),
        ("GET", "/aslseg/metrics", "annotator"),
        ("GET", "/aslseg/reports/1", "annotator"),
        ("GET", "/ohif/", "annotator"),
        ("POST", "/scoring/none", "annotator"),
        ("POST", "/train/none", "admin"),
        ("POST", "/train/", "admin"),
        ("DELETE", "/train/", "admin"),
        ("POST", "/batch/infer/none", "admin"),
        ("POST", "/reload", "admin"),
        ("DELETE", "/datastore/label?id=none&tag=final", "admin"),
        ("DELETE", "/datastore/image?id=none", "admin"),
        ("DELETE", "/datastore/?id=none", "admin"),
        ("GET", "/logs/", "admin"),
    ],
)
def test_who_may_do_what(guarded: tuple[Any, dict[str, str]], method: str, path: str, least: str) -> None:
    server, tokens = guarded
    for role in ROLES:
        headers = {"authorization": f"Bearer {tokens[role]}"}
        answer = requests.request(method, server.url + path, headers=headers, timeout=60)
        allowed = ROLES.index(role) >= ROLES.index(least)
        assert (answer.status_code == 403) != allowed, (role, answer.status_code, answer.text[:200])
        assert answer.status_code < 500


def test_the_name_in_labels_is_the_authenticated_one(guarded: tuple[Any, dict[str, str]]) -> None:
    server, tokens = guarded
    scan = nib.load(Path(server.studies) / f"{CASE}.nii.gz")
    label = nib.Nifti1Image(np.ones(scan.shape, np.uint8), scan.affine).to_bytes()
    answer = requests.put(
        f"{server.url}/datastore/label?image={CASE}",
        files={"label": ("label.nii", label)},
        data={"params": json.dumps({"user": "somebody else", "client_id": "desk 2"})},
        auth=("annotator-1", tokens["annotator"]),
        timeout=60,
    )
    assert answer.ok, answer.text
    headers = {"authorization": f"Bearer {tokens['reviewer']}"}
    info = requests.get(f"{server.url}/datastore/label/info?label={CASE}&tag=final", headers=headers, timeout=60).json()
    assert (info["user"], info["client_id"]) == ("annotator-1", "desk 2")
    headers = {"authorization": f"Bearer {tokens['admin']}"}
    assert requests.delete(f"{server.url}/datastore/label?id={CASE}&tag=final", headers=headers, timeout=60).ok
    events = Ledger(Path(server.studies) / ".aslseg" / "ledger.sqlite").events(kinds=("saved", "deleted"))
    assert [(e.kind, e.details["by"]) for e in events] == [("saved", "annotator-1"), ("deleted", "admin-1")]


def test_no_scan_is_named_in_the_log(guarded: tuple[Any, dict[str, str]]) -> None:
    server, tokens = guarded
    headers = {"authorization": f"Bearer {tokens['annotator']}"}
    assert requests.post(f"{server.url}/activelearning/random", headers=headers, json={}, timeout=60).ok
    log = server.log
    assert "Next sample" in log
    assert "case-" in log
    assert CASE not in log
    assert not any(token in log for token in tokens.values())
