"""The headline of a report, sent over the loopback interface."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from aslseg.errors import BadSettingsError
from aslseg.review import webhook
from aslseg.settings import load_settings

CONTENT = {"text": "Round 1: 2 of 3 scans promoted.", "round": 1}


class Receiver(HTTPServer):
    """Keeps what is sent to it; answers with ``status``."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[str, str | None, Any]] = []


class Handler(BaseHTTPRequestHandler):
    """Takes JSON."""

    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, self.headers["content-type"], json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Nothing to stderr."""


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go to the receiver, whatever proxy this machine has."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_it_is_sent_as_json(receiver: Receiver) -> None:
    assert webhook.send(f"http://127.0.0.1:{receiver.server_port}/hooks/secret", CONTENT)
    assert receiver.received == [("/hooks/secret", "application/json", CONTENT)]


def test_what_is_no_http_server_is_one_line_too(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.hospital.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert not webhook.send(f"http://127.0.0.1:{server.getsockname()[1]}/secret", CONTENT)
        thread.join()
    (line,) = (r.getMessage() for r in caplog.records)
    assert line == "report_webhook: 127.0.0.1 did not take the headline (BadStatusLine)"


def test_a_refusal_is_one_line_without_the_address(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.status = 403
    assert not webhook.send(f"http://127.0.0.1:{receiver.server_port}/hooks/secret", CONTENT)
    assert [r.getMessage() for r in caplog.records] == [
        "report_webhook: 127.0.0.1 did not take the headline (HTTP 403)"
    ]


def test_nobody_listens(receiver: Receiver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 0.2)
    with HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    assert not webhook.send(f"http://127.0.0.1:{port}/hooks/secret", CONTENT)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == "report_webhook: 127.0.0.1 did not take the headline (ConnectionRefusedError)"


@pytest.mark.parametrize(
    "address", ["ftp://host/x", "file:///etc/passwd", "host/x", "http://", "http://h:99999/", "http://a b/"]
)
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    with pytest.raises(BadSettingsError, match="report_webhook: expected an address such as https"):
        load_settings({"report_webhook": address}, env={})


def test_the_address_may_be_empty() -> None:
    assert load_settings({}, env={})[0].report_webhook == ""
