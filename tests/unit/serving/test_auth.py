"""Tokens, roles, and the ways in which Slicer and browsers send them."""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI, HTTPException, UploadFile
from monailabel.config import settings as platform
from monailabel.endpoints.user import auth as theirs
from starlette.testclient import TestClient

from aslseg.errors import BadSettingsError
from aslseg.serving import auth, login_first
from aslseg.serving.login_first import install_login_first
from aslseg.serving.tokens import new_token_line, read_token_file
from aslseg.settings import load_settings

ROLES = ("annotator", "reviewer", "admin")


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """Role to token; the names are those of the roles. The file is ``tokens`` in the same folder."""
    made = {role: new_token_line(role, role) for role in ROLES}
    (tmp_path / "tokens").write_text("# who may log in\n\n" + "\n".join(line for _, line in made.values()) + "\n")
    return {role: token for role, (token, _) in made.items()}


@pytest.fixture
def client(tmp_path: Path, tokens: dict[str, str]) -> Iterator[TestClient]:
    """A client of an application with a route for each role."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "MONAI_LABEL_AUTH_ENABLE", False)
        yield TestClient(application(token_file=str(tmp_path / "tokens")))


def application(**conf: str) -> FastAPI:
    host = FastAPI()

    @host.get("/annotate")
    def annotate(user: auth.User = auth.ANNOTATOR) -> str | None:
        return auth.authenticated_name(user)

    @host.get("/administer")
    def administer(user: auth.User = auth.ADMIN) -> str | None:
        return auth.authenticated_name(user)

    @host.put("/upload")
    def upload(file: UploadFile, user: auth.User = auth.ANNOTATOR) -> int:
        return len(file.file.read())

    auth.install_auth(host, load_settings(conf, env={})[0])
    return host


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def basic(name: str, token: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_do_its_own(client: TestClient, tokens: dict[str, str], role: str) -> None:
    assert client.get("/annotate", headers=bearer(tokens[role])).json() == role
    assert client.get("/annotate", headers=basic(role, tokens[role])).json() == role
    expected = 200 if role == "admin" else 403
    assert client.get("/administer", headers=bearer(tokens[role])).status_code == expected


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer junk"},
        {"authorization": "Bearer \x80\xff"},
        {"authorization": "Bearer eyJhbGciOiJub25lIn0.e30."},
        {"authorization": "Basic junk"},
        {"authorization": "Basic " + base64.b64encode(b"no colon").decode()},
        {"authorization": "Digest x"},
        basic("admin", "junk"),
    ],
)
def test_everything_else_is_asked_to_log_in(client: TestClient, headers: dict[str, str]) -> None:
    encoded = {k: v.encode("latin-1") for k, v in headers.items()}
    answer = client.get("/annotate", headers=encoded)  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic"), "a browser asks for name and token"


def test_a_token_under_another_name_is_refused(client: TestClient, tokens: dict[str, str]) -> None:
    assert client.get("/annotate", headers=basic("annotator", tokens["admin"])).status_code == 401


def test_slicer_logs_in_with_name_and_token(client: TestClient, tokens: dict[str, str]) -> None:
    assert client.get("/auth/").json()["enabled"] is True
    form = {"username": "reviewer", "password": tokens["reviewer"]}
    token = client.post("/auth/token", data=form).json()
    headers = {"authorization": f"{token['token_type']} {token['access_token']}"}
    assert client.get("/auth/token/valid", headers=headers).json()["username"] == "reviewer"
    assert client.get("/annotate", headers=headers).json() == "reviewer"
    assert client.post("/auth/token", data=form | {"password": "wrong"}).status_code == 401
    assert client.post("/auth/token", data=form | {"username": "admin"}).status_code == 401


def test_a_removed_line_ends_access_at_once(client: TestClient, tokens: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("reviewer")))
    os.utime(path, (1, 1))
    assert client.get("/annotate", headers=bearer(tokens["reviewer"])).status_code == 401
    assert client.get("/annotate", headers=bearer(tokens["annotator"])).is_success


def test_a_file_that_was_broken_lets_nobody_in(client: TestClient, tokens: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("annotator boss 123\n")
    with pytest.raises(auth.RefusedError, match=r"nobody can log in.*line 1") as refused:
        client.get("/annotate", headers=bearer(tokens["annotator"]))
    assert refused.value.status == 503


@pytest.mark.parametrize(
    "line", ["", "# nobody", "ann annotator", "ann boss " + "0" * 64, "ann admin 123", "a/b admin " + "0" * 64]
)
def test_a_file_that_cannot_be_understood(tmp_path: Path, line: str) -> None:
    (tmp_path / "tokens").write_text(line)
    with pytest.raises(BadSettingsError, match="aslseg token"):
        read_token_file(tmp_path / "tokens")
    with pytest.raises(BadSettingsError, match="cannot be read"):
        read_token_file(tmp_path / "missing")


def test_the_file_does_not_hold_the_token(tokens: dict[str, str], tmp_path: Path) -> None:
    text = (tmp_path / "tokens").read_text()
    assert not any(token in text for token in tokens.values())
    assert len(set(tokens.values())) == 3


def test_without_authentication_nobody_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "MONAI_LABEL_AUTH_ENABLE", False)
    monkeypatch.delenv("MONAI_LABEL_AUTH_ENABLE", raising=False)
    assert TestClient(application()).get("/administer").json() is None


@pytest.fixture
def realm(monkeypatch: pytest.MonkeyPatch) -> rsa.RSAPrivateKey:
    """The private key of a Keycloak realm that MONAI Label was told to use."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    monkeypatch.setattr(platform, "MONAI_LABEL_AUTH_ENABLE", True)
    monkeypatch.setenv("MONAI_LABEL_AUTH_ENABLE", "True")
    monkeypatch.setattr(theirs, "get_public_key", lambda uri: public)
    return key


def test_tokens_of_keycloak(realm: rsa.RSAPrivateKey) -> None:
    client, roles = TestClient(application()), [platform.MONAI_LABEL_AUTH_ROLE_ANNOTATOR]
    payload = {"preferred_username": "ann", "exp": time.time() + 60, "realm_access": {"roles": roles}}
    token = jwt.encode(payload, realm, "RS256")
    assert client.get("/annotate", headers=bearer(token)).json() == "ann"
    assert client.get("/administer", headers=bearer(token)).status_code == 403
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for bad in (
        jwt.encode(payload, other, "RS256"),
        jwt.encode(payload | {"exp": 1}, realm, "RS256"),
        jwt.encode(payload | {"preferred_username": 7}, realm, "RS256"),
        jwt.encode(payload, "x" * 32, "HS256"),
        "junk",
    ):
        assert client.get("/annotate", headers=bearer(bad)).status_code == 401
    odd = jwt.encode(payload | {"realm_access": [1]}, realm, "RS256")
    assert client.get("/annotate", headers=bearer(odd)).status_code == 403


def test_a_keycloak_that_does_not_answer(realm: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*args: object, **kwargs: object) -> str:
        raise requests.ConnectionError("refused")

    monkeypatch.setattr(theirs, "get_public_key", silent)
    monkeypatch.setattr(theirs, "open_id_configuration", silent)
    client = TestClient(application())
    for answer in (
        client.get("/annotate", headers=bearer("any")),
        client.post("/auth/token", data={"username": "ann", "password": "x"}),
    ):
        assert (answer.status_code, "Keycloak" in answer.json()["detail"]) == (503, True)
    with pytest.raises(HTTPException):
        auth.keycloak_user("any")


class Sent:
    """An ASGI client whose body comes in pieces of a megabyte, counted as they are read."""

    def __init__(self, pieces: int, stalls: bool) -> None:
        self.left, self.read, self.stalls, self.answer = pieces, 0, stalls, {}

    async def receive(self) -> dict[str, Any]:
        self.left -= 1
        self.read += 1
        if self.stalls:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": bytes(1_000_000), "more_body": self.left > 0}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.answer = {"status": message["status"], **{k.decode(): v.decode() for k, v in message["headers"]}}


def upload(
    client: TestClient, pieces: int, method: str = "PUT", headers: dict[str, str] | None = None, stalls: bool = False
) -> Sent:
    sent = Sent(pieces, stalls)
    headers = {"transfer-encoding": "chunked", "content-type": "multipart/form-data; boundary=x"} | (headers or {})
    scope = {"type": "http", "method": method, "path": "/upload", "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(k.encode(), v.encode()) for k, v in headers.items()], "app": client.app}
    asyncio.run(client.app(scope, sent.receive, sent.send))  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "GET"])
@pytest.mark.parametrize(
    ("headers", "most"),
    [
        ({}, 500),
        ({"authorization": "Bearer junk"}, 500),
        ({"expect": "100-continue"}, 0),
        ({"authorization": "x"}, 500),
    ],
)
def test_nobody_sends_a_file_before_the_login(
    client: TestClient, method: str, headers: dict[str, str], most: int
) -> None:
    """A gigabyte would come: FastAPI writes the files of a form to the disk before it asks for the user."""
    install_login_first(client.app)  # type: ignore[arg-type]
    sent = upload(client, 1000, method, headers)
    assert (sent.answer["status"], sent.answer["connection"]) == (401, "close")
    assert "Basic" in sent.answer["www-authenticate"]
    assert sent.read == most, "so much is read that most clients see the answer"


def test_a_label_that_comes_with_an_old_token_is_read_to_its_end(client: TestClient) -> None:
    """The connection would be reset under a browser that still sends, which then shows no 401."""
    install_login_first(client.app)  # type: ignore[arg-type]
    sent = upload(client, 30)
    assert (sent.answer["status"], sent.left) == (401, 0)


def test_who_sends_slowly_is_not_read_for_ever(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_first, "DISCARD_SECONDS", 0.05)
    install_login_first(client.app)  # type: ignore[arg-type]
    sent = upload(client, 30, stalls=True)
    assert (sent.answer["status"], sent.read) == (401, 1)


def test_after_the_login_files_come(client: TestClient, tokens: dict[str, str], tmp_path: Path) -> None:
    install_login_first(client.app)  # type: ignore[arg-type]
    files = {"file": ("scan.nii", bytes(3_000_000))}
    assert client.put("/upload", files=files, headers=bearer(tokens["annotator"])).json() == 3_000_000
    form = {"username": "reviewer", "password": tokens["reviewer"]}
    assert client.post("/auth/token", data=form).is_success, "who logs in has not logged in yet"
    (tmp_path / "tokens").write_text("no line of a token file")
    answer = client.put("/upload", files=files, headers=bearer(tokens["annotator"]))
    assert (answer.status_code, "nobody can log in" in answer.json()["detail"]) == (503, True)


def test_a_token_file_on_a_broken_disk(
    client: TestClient, tokens: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_login_first(client.app)  # type: ignore[arg-type]

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(auth.FileStamp, "of", broken)
    answer = client.put("/upload", files={"file": ("scan.nii", b"1")}, headers=bearer(tokens["annotator"]))
    assert (answer.status_code, "nobody can log in: the token file" in answer.json()["detail"]) == (503, True)


def test_without_logins_nobody_is_asked() -> None:
    host = application()
    install_login_first(host)
    assert TestClient(host).put("/upload", files={"file": ("scan.nii", b"1234")}).json() == 4
