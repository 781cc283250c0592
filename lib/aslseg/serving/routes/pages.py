"""Pages for people and for machines that watch the server: status, health, metrics, log, and OHIF."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from monailabel.config import settings as platform
from monailabel.endpoints import logs, ohif, proxy
from monailabel.utils.async_tasks.task import AsyncTask

from aslseg.errors import LedgerError
from aslseg.review.page import render
from aslseg.review.report import report_path, write
from aslseg.review.status import collect
from aslseg.serving.auth import ADMIN, USER, User
from aslseg.serving.health import check_health
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.metrics import CONTENT_TYPE
from aslseg.serving.ohif_patches import patched_text
from aslseg.serving.threads import without_loop

if TYPE_CHECKING:
    from aslseg.serving.app import ServedApp

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
REPORT_POLICY = f"{POLICY}; img-src data:"
logger = logging.getLogger(__name__)
ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+/")
NO_DOCS = "The interactive documentation needs scripts from the internet and is switched off. Schema: /openapi.json\n"
MAX_LOG_LINES = 10_000
LAST_ROUND = 999_999


def add_routes(router: APIRouter, app: ServedApp) -> None:
    """Add the routes to a router."""
    _status(router, app)
    _monitoring(router, app)
    _viewer(router, app)
    _pacs(router, app)

    @router.get("/", include_in_schema=False)
    def start() -> Response:
        return RedirectResponse("/aslseg/")

    @router.get("/docs", include_in_schema=False)
    def docs() -> Response:
        """MONAI Label's page loads its scripts from a CDN, which most hospitals do not reach."""
        return PlainTextResponse(NO_DOCS, 404)


def _status(router: APIRouter, app: ServedApp) -> None:
    def now() -> dict[str, Any]:
        tasks, _ = AsyncTask.status("train", all=True)
        errors = [
            {"model": t["request"].get("model"), "time": t.get("end_ts"), "lines": list(t.get("details", []))[-5:]}
            for t in tasks or []
            if t["status"] == "ERROR"
        ]
        return collect(app.settings, app.paths, app.datastore().status(), errors, app.scan_checks.messages())

    @router.get("/aslseg/status")
    def status(user: User = USER) -> Any:
        return now()

    @router.get("/aslseg/", response_class=HTMLResponse)
    @router.get("/aslseg", response_class=HTMLResponse)
    def page(user: User = USER) -> Any:
        return HTMLResponse(render(now()), headers={"Content-Security-Policy": POLICY})

    @router.get("/aslseg/reports/{number}", response_class=HTMLResponse)
    def report(number: Annotated[int, PathParameter(ge=1, le=LAST_ROUND)], user: User = USER) -> Any:
        """The report of a round; it is written now if the round could not."""
        path = report_path(app.paths, number)
        try:
            if not path.is_file():
                write(app.paths, app.settings, number)
        except LedgerError as error:
            logger.warning("%s", error)
            raise RefusedError(
                f"there is no report of round {number}; see /aslseg/ for those that there are", 404
            ) from None
        return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})


def _monitoring(router: APIRouter, app: ServedApp) -> None:
    @router.get("/aslseg/health")
    def health() -> Any:
        """For load balancers and containers, which do not log in; it names no scan."""
        found = check_health(app.paths, app.settings, app.datastore())
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    @router.get("/aslseg/metrics")
    def metrics(user: User = USER) -> Any:
        return Response(app.metrics.render(), media_type=CONTENT_TYPE)

    @router.get("/logs/")
    def log(lines: int = 300, user: User = ADMIN) -> Any:
        """As MONAI Label's, without the page around it, which loads its scripts from a CDN."""
        path = Path(platform.MONAI_LABEL_APP_DIR, "logs", "app.log")
        return logs.get_logs(str(path), min(max(lines, 1), MAX_LOG_LINES), False, True, 0)

    @router.get("/logs/gpu")
    def gpu(user: User = ADMIN) -> Any:
        program = shutil.which("nvidia-smi")
        if program is None:
            raise RefusedError("this machine has no nvidia-smi", 404)
        shown = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        return PlainTextResponse(shown.stdout + shown.stderr)


def _viewer(router: APIRouter, app: ServedApp) -> None:
    folder = (Path(ohif.__file__).parent / "static" / "ohif").resolve()  # the environment may be a link

    @router.get("/ohif/{path:path}", include_in_schema=False)
    def viewer(path: str, request: Request, user: User = USER) -> Response:
        """OHIF's files; MONAI Label's own route does not find those in sub-folders, and OHIF guesses port 8000."""
        if "\0" in path:
            raise RefusedError("no file can have the name that was asked for", 404)
        file = (folder / path).resolve()
        if path and file.is_file() and file.is_relative_to(folder):
            text = patched_text(file, app.settings.label_set)
            if text is None:
                return FileResponse(file)
            return Response(text.encode("utf-8", "surrogateescape"), media_type="text/javascript")
        page = FileResponse(folder / "index.html")
        here = str(request.base_url)
        if "MONAILABEL_SERVER_URL" not in request.cookies and ADDRESS.fullmatch(here):
            page.headers.append("set-cookie", f"MONAILABEL_SERVER_URL={here}; Path=/; SameSite=Lax")
        return page


async def _body(request: Request) -> bytes:
    """Read the body on the event loop, so that it is there when a worker thread wants it."""
    return await request.body()


def _pacs(router: APIRouter, app: ServedApp) -> None:
    forward = without_loop(proxy.proxy_dicom)

    @router.api_route("/proxy/dicom/{path:path}", methods=["GET", "POST"], include_in_schema=False)
    def dicom(request: Request, path: str, body: bytes = Depends(_body), user: User = USER) -> Any:
        """OHIF's way to the PACS, and to nothing beside its DICOMweb address."""
        if app.paths.studies is not None:
            raise RefusedError("the scans are in a folder; there is no PACS to ask", 404)
        if "%" in path or ".." in path.split("/"):
            raise RefusedError("a DICOMweb path holds neither '..' nor '%'", 400)
        operation, _, rest = path.partition("/")
        known = operation in ("wado", "qido", "stow")
        return forward(request, operation if known else "", rest if known else path)
