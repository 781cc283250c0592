"""Routes in front of MONAI Label's own, with the same addresses and shapes.

MONAI Label's endpoints are coroutines that block: one inference, one held lock or one slow disk stops the whole server.
FastAPI runs a plain ``def`` endpoint in a worker thread, so ours are plain functions, and the endpoints of MONAI Label
that remain are called from such a function. They come first in the list of routes.
"""

from __future__ import annotations

import errno
import inspect
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import requests
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from monailabel.interfaces.exception import MONAILabelException
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from aslseg.errors import AslsegError
from aslseg.files import FULL
from aslseg.serving.http_errors import headers_of, pacs_error, status_of
from aslseg.serving.routes import datastore, inference, pages, tasks
from aslseg.serving.threads import without_loop

if TYPE_CHECKING:
    from aslseg.serving.app import ServedApp

logger = logging.getLogger(__name__)

IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTDIR)
"""What the operating system answers to names that no file can have: they come from the client."""


def install(host: FastAPI, app: ServedApp) -> None:
    """Put our routes and error answers in front of MONAI Label's."""
    router = APIRouter()
    for module in (inference, datastore, tasks, pages):
        module.add_routes(router, app)
    put_in_front(host, router)
    answer_errors(host)


def answer_errors(host: FastAPI) -> None:
    """Answer errors with what was expected, what came and what to do."""
    host.add_exception_handler(AslsegError, _readable)
    host.add_exception_handler(MONAILabelException, _unknown)
    host.add_exception_handler(OSError, _disk)
    host.add_exception_handler(requests.RequestException, _pacs)  # an OSError too, but not of the disk
    host.add_exception_handler(HTTPException, _unread)
    # the stack is built at the first request, handlers included; building it again takes ours in
    host.middleware_stack = None


def put_in_front(host: FastAPI, router: APIRouter) -> None:
    """Let a router answer first; the routes that were there before follow, none of them on the event loop."""
    before, others = APIRouter(), list[BaseRoute]()
    for prefix, route in _flat(host.router.routes):
        if isinstance(route, APIRoute):
            before.add_api_route(
                prefix + route.path,
                without_loop(route.endpoint) if inspect.iscoroutinefunction(route.endpoint) else route.endpoint,
                methods=sorted(route.methods or ()),
                name=route.name,
                summary=route.summary,
                tags=route.tags,
                response_model=route.response_model,
                include_in_schema=route.include_in_schema,
                deprecated=route.deprecated,
            )
        else:
            others.append(route)
    host.router.routes.clear()
    host.include_router(router)
    host.include_router(before)
    host.router.routes.extend(others)


def _flat(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[tuple[str, BaseRoute]]:
    """Each route and what comes before its path: in newer versions of FastAPI a router stays one route."""
    for route in routes:
        included: APIRouter | None = getattr(route, "original_router", None)
        if included is None:
            yield prefix, route
        else:
            yield from _flat(included.routes, prefix + route.include_context.prefix)  # type: ignore[attr-defined]


def _readable(request: Request, error: Exception) -> Response:
    status = status_of(error) if isinstance(error, AslsegError) else 500
    logger.warning("%s %s: %d: %s", request.method, request.url.path, status, error)
    headers = headers_of(error) if isinstance(error, AslsegError) else {}
    return JSONResponse({"detail": str(error)}, status, headers)


def _unknown(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(getattr(error, "msg", error))}, 404)


def _disk(request: Request, error: Exception) -> Response:
    """The disk, or what is mounted there, does not do what it should: named, without a traceback for the client."""
    if getattr(error, "errno", None) in IMPOSSIBLE:
        logger.warning("%s %s: %s", request.method, request.url.path[:200], error)
        reading = request.method in ("GET", "HEAD")
        return JSONResponse({"detail": "no file can have the name that was asked for"}, 404 if reading else 400)
    logger.exception("%s %s", request.method, request.url.path, exc_info=error)
    if getattr(error, "errno", None) in FULL:
        text = "a disk of the server is full; free some space there and send it again. What was stored stays as it is"
        return JSONResponse({"detail": text}, 507)
    reason = getattr(error, "strerror", None) or type(error).__name__
    text = f"the server could not read or write a file ({reason}); check its disk and its log, then send it again. "
    return JSONResponse({"detail": f"{text}What was stored stays as it is"}, 503)


def _pacs(request: Request, error: Exception) -> Response:
    return _readable(request, pacs_error(error))


async def _unread(request: Request, error: Exception) -> Response:
    """FastAPI takes a body that cannot be written to the disk for one that cannot be understood."""
    if isinstance(error.__cause__, OSError):
        return _disk(request, error.__cause__)
    return await http_exception_handler(request, cast("HTTPException", error))
