"""What is refused before anything reads a request: foreign Host names, foreign origins, uploads that stall."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException
from monailabel.config import settings as platform
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aslseg.settings import Settings

STALL_SECONDS = 30.0
LEAST_BYTES_PER_SECOND = 10_000
MOST_OTHER_BYTES = 2_000_000
"""Bytes of a body without files: it is parsed in one piece, on the event loop, before it is known who asks.
10,000 points with all their digits take 0.6 MB, ten times as many as a request may have."""
WITH_FILES = {"datastore", "infer", "session"}
"""Parts of the addresses to which files are sent; ``batch/infer`` takes none."""
READING = ("GET", "HEAD", "OPTIONS")


class RequestGuard:
    """ASGI middleware that lets through what comes from this server's own pages and from programs.

    A web page that an annotator visits can send requests to a server on the annotator's machine, also through a name
    that it makes point there (DNS rebinding). Browsers say where a request comes from in ``Origin`` and
    ``Sec-Fetch-Site``, and which name was asked in ``Host``; Slicer sends no origin.

    Args:
        app: What follows.
        hosts: Names of the server beside ``localhost``, the machine's name and IP addresses.
        origins: Other origins that may send requests, as ``https://viewer.example.org``.
        max_bytes: Largest body in parts (``multipart/form-data``), the form in which files come, at an address that
            takes files; any other body has at most 2 MB.
        stall_seconds: A body of which nothing comes for this long is dropped.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        max_bytes: float = 4e9,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.app, self.max_bytes, self.stall_seconds = app, max_bytes, stall_seconds
        self.hosts = {"localhost", socket.gethostname().lower(), *(h.lower() for h in hosts)}
        self.origins = {origin.lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 400, 403 or 413, or pass the request on."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            most = self._most(scope["path"], headers)
            refusal = self.refusal(scope["method"], headers, most)
            if refusal is not None:
                status, detail = refusal
                await JSONResponse({"detail": detail}, status, {"connection": "close"})(scope, receive, send)
                return
            receive = self._bounded(receive, most)
        await self.app(scope, receive, send)

    def refusal(self, method: str, headers: Headers, most: float = MOST_OTHER_BYTES) -> tuple[int, str] | None:
        """Status and reason if a request may not pass, else None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._known_host(host):
            return 400, f"this server is not called {host[:80]!r}; the setting hosts (--conf hosts NAME) adds a name"
        if _length(headers) > most:
            return 413, f"the request has {headers['content-length']} bytes; {_allowed(most)}"
        if method in READING:
            return None
        if origin is not None:
            own = urlsplit(origin).netloc.lower() == host.lower()
            foreign = not own and origin.lower() not in self.origins
        else:
            foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if foreign:
            shown = (origin or "another site")[:80]
            return 403, f"requests from {shown!r} are refused; the setting origins (--conf origins URL) allows it"
        return None

    def _known_host(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        return True  # an address is not resolved, so that no other site can pretend to be this one

    def _most(self, path: str, headers: Headers) -> float:
        """Largest body of a request. A route without files would hold all of it in memory, whatever its type."""
        kind, parts = headers.get("content-type", "").partition(";")[0].strip().lower(), set(path.split("/"))
        files = kind == "multipart/form-data" and parts & WITH_FILES and "batch" not in parts
        return self.max_bytes if files else min(self.max_bytes, MOST_OTHER_BYTES)

    def _bounded(self, receive: Receive, most: float) -> Receive:
        """``receive`` with limits on the time that the body is waited for, and on its size."""
        waited, received, complete = 0.0, 0, False

        async def limited() -> Message:
            nonlocal waited, received, complete
            if complete:
                return await receive()
            # what the server does before it asks for the body, such as an archive, is no delay of the sender
            began, earned = time.monotonic(), self.stall_seconds + received / LEAST_BYTES_PER_SECOND - waited
            try:
                message = await asyncio.wait_for(receive(), max(0.0, min(self.stall_seconds, earned)))
            except TimeoutError:
                text = f"the upload stalled after {received} bytes and was dropped; send it again"
                raise HTTPException(408, text, {"connection": "close"}) from None
            waited += time.monotonic() - began
            received += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if received > most:
                text = f"the request is too large; {_allowed(most)}"
                raise HTTPException(413, text, {"connection": "close"})
            return message

        return limited


def _allowed(most: float) -> str:
    return f"at most {most:.0f} bytes are accepted; send files as multipart/form-data, of up to max_upload_gb"


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isdecimal() else 0


def install_guard(host: FastAPI, settings: Settings) -> None:
    """Put the guard in front, in place of MONAI Label's CORS headers, which allow every origin by default."""
    allowed = [*_listed(settings.origins), *map(str, platform.MONAI_LABEL_CORS_ORIGINS)]
    origins = [origin.rstrip("/") for origin in allowed]
    host.user_middleware[:] = [
        Middleware(RequestGuard, hosts=_listed(settings.hosts), origins=origins, max_bytes=settings.max_upload_gb * 1e9)
    ]
    if origins:
        answers = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], allow_credentials=True
        )
        host.user_middleware.append(answers)
    host.middleware_stack = None


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
