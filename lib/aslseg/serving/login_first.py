"""Nobody sends a file before it is known who they are.

FastAPI reads the body of a request, and writes its files to the disk, before it asks for the user: without this anybody
on the network could fill the server's disk with uploads that are refused once they are there.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI, HTTPException
from monailabel.endpoints.user import auth as theirs
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from aslseg.serving.http_errors import RefusedError

OPEN = {("POST", "/auth/token")}
"""Requests with a body that come before the login: name and password."""
DISCARDED_BYTES, DISCARD_SECONDS = 500_000_000, 60.0
"""Of a refused body so much is read, for so long, and thrown away: many clients read no answer before they have sent
all, and would see a broken connection in place of the 401 that has people log in again."""


class LoginFirst:
    """ASGI middleware that asks who sends a request with a body, before anything reads that body.

    What the person may do is asked later, by the route.

    Args:
        app: What follows.
        host: The application; the function that finds its user is MONAI Label's, or what stands in its place.
    """

    def __init__(self, app: ASGIApp, host: FastAPI) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 401 or 503, or pass the request on."""
        if scope["type"] == "http" and _has_body(Headers(scope=scope)) and (scope["method"], scope["path"]) not in OPEN:
            refused = await self._refused(scope)
            if refused is not None:
                await _discard(receive, Headers(scope=scope))
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _refused(self, scope: Scope) -> JSONResponse | None:
        find = self.host.dependency_overrides.get(theirs.get_current_user)
        if find is None:  # no authentication is configured
            return None
        try:
            # a token file is read, or Keycloak asked
            await run_in_threadpool(find, Request(scope))
        except HTTPException as error:
            headers = {**(error.headers or {}), "connection": "close"}
            return JSONResponse({"detail": error.detail}, error.status_code, headers)
        except RefusedError as error:
            return JSONResponse({"detail": str(error)}, error.status, {"connection": "close"})
        return None


def install_login_first(host: FastAPI) -> None:
    """Let the middleware answer after all that were installed before."""
    host.user_middleware.append(Middleware(LoginFirst, host=host))
    host.middleware_stack = None


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def _discard(receive: Receive, headers: Headers) -> None:
    left, more = DISCARDED_BYTES, "expect" not in headers  # who sends Expect waits for the answer
    until = time.monotonic() + DISCARD_SECONDS
    while left > 0 and more:
        try:
            message = await asyncio.wait_for(receive(), until - time.monotonic())
        except (HTTPException, TimeoutError):  # it stalled, is too large, or takes too long
            return
        left -= len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
