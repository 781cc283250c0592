"""Routes in front of MONAI Label's own: they answer in worker threads, with readable errors, and drop nothing.

MONAI Label's endpoints run blocking code on the event loop, so that one inference stops the whole server. A plain
``def`` endpoint runs in a thread; these come first in the list of routes and have the same addresses and shapes.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, File, Form, Request, Response, UploadFile
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from monailabel.config import settings as platform
from monailabel.datastore.utils.convert import binary_to_image
from monailabel.endpoints import activelearning, infer, ohif, scoring, session, train
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.exception import MONAILabelException
from monailabel.utils.async_tasks.task import AsyncTask

from aslseg.errors import AslsegError
from aslseg.review.page import render
from aslseg.review.status import collect
from aslseg.serving.http_errors import RefusedError, safe_name, status_of
from aslseg.serving.infer import SessionUpload, Upload
from aslseg.serving.mask_encoding import gzipped_bytes
from aslseg.serving.ohif_patches import mended
from aslseg.serving.params import parse, validate_params
from aslseg.volume.io import IMAGE_EXTENSIONS, extension

if TYPE_CHECKING:
    from aslseg.serving.app import ServedApp

logger = logging.getLogger(__name__)

USER = Depends(RBAC(platform.MONAI_LABEL_AUTH_ROLE_USER))
ANNOTATOR = Depends(RBAC(platform.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
ADMIN = Depends(RBAC(platform.MONAI_LABEL_AUTH_ROLE_ADMIN))
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+/")
WORTH_COMPRESSING = 200_000
SESSION = re.compile(r"[0-9a-f-]{8,64}")


def install(host: FastAPI, app: ServedApp) -> None:
    """Put our routes and error answers in front of MONAI Label's."""
    router = APIRouter()
    _inference(router, app)
    _labels(router, app)
    _training(router, app)
    _viewer(router, app)
    _pages(router, app)
    before = len(host.router.routes)
    host.include_router(router)
    ours = host.router.routes[before:]
    host.router.routes[:] = ours + host.router.routes[:before]
    # the stack is built at the first request, handlers included; building it again takes ours in
    host.middleware_stack = None
    host.add_exception_handler(AslsegError, _readable)
    host.add_exception_handler(MONAILabelException, _unknown)


def _readable(request: Request, error: Exception) -> Response:
    status = status_of(error) if isinstance(error, AslsegError) else 500
    logger.warning("%s %s: %d: %s", request.method, request.url.path, status, error)
    return JSONResponse({"detail": str(error)}, status)


def _unknown(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(getattr(error, "msg", error))}, 404)


def _inference(router: APIRouter, app: ServedApp) -> None:
    @router.post("/infer/{model}")
    def run(
        background_tasks: BackgroundTasks,
        http: Request,
        model: str,
        image: str = "",
        session_id: str = "",
        params: str = Form("{}"),
        file: UploadFile | None = None,
        label: UploadFile | None = None,
        output: infer.ResultType | None = None,
        user: User = USER,
    ) -> Any:
        request = validate_params(parse(params or "{}"))
        if output == infer.ResultType.dicom_seg:
            raise RefusedError("output=dicom_seg is not offered; save the label instead, which makes a DICOM SEG")
        request.setdefault("client_id", user.username)
        request["client"] = _who(request, user, http, session_id)
        chosen: str | Upload = image
        folder = Path(tempfile.mkdtemp(prefix="aslseg-upload-"))
        background_tasks.add_task(shutil.rmtree, folder, ignore_errors=True)
        try:
            if session_id:
                chosen = SessionUpload(_session_image(app, session_id))
            elif file is not None:
                chosen = Upload(_keep(file, folder, "image"))
            elif not image:
                raise RefusedError("expected an image id, a file or a session_id, got none of them")
            given = {}
            if label is not None:
                given["label"] = Upload(_keep_label(label, folder, chosen, app))
                request.pop("label", None)
            result = app.infer({**request, **given, "model": model, "image": chosen})
        except BaseException:
            # background tasks run only after an answer that succeeded
            shutil.rmtree(folder, ignore_errors=True)
            raise
        reply = infer.send_response(app.datastore(), result, output, background_tasks)
        return _compressed(reply, http.headers.get("accept-encoding", ""))

    @router.post("/infer/wsi/{model}")
    @router.post("/infer/wsi_v2/{model}")
    def pathology(model: str, user: User = USER) -> Any:
        raise RefusedError("ASLseg works on volumes, not on whole-slide images; use /infer", 404)

    @router.put("/session/")
    def new_session(
        background_tasks: BackgroundTasks,
        uncompress: bool = False,
        expiry: int = 0,
        files: list[UploadFile] = File(...),  # noqa: B008 - FastAPI's way
        user: User = USER,
    ) -> Any:
        if uncompress:
            raise RefusedError("archives are not unpacked; upload the volume itself")
        if len(files) != 1 or extension(Path(files[0].filename or "")) is None:
            raise RefusedError(f"expected one volume ({', '.join(IMAGE_EXTENSIONS)}); DICOM goes through a PACS", 422)
        return session.create_session(background_tasks, False, expiry, files)


def _compressed(reply: Any, accepted: str) -> Any:
    """A reply that is worth it, compressed for clients that say they can read it: OHIF asks for raw voxels, 42 MB."""
    if "gzip" not in accepted or not isinstance(reply, Response):
        return reply
    content = Path(reply.path).read_bytes() if isinstance(reply, FileResponse) else bytes(reply.body)
    if len(content) < WORTH_COMPRESSING:
        return reply
    headers = {k: v for k, v in reply.headers.items() if k in ("content-type", "content-disposition")}
    return Response(gzipped_bytes(content), headers=headers | {"content-encoding": "gzip", "vary": "accept-encoding"})


def _who(request: dict[str, Any], user: User, http: Request, session_id: str) -> str:
    """Whose clicks: Slicer's default name stands for everybody, but with the address people at two desks stay two."""
    return "|".join((str(request["client_id"]), user.username, http.client.host if http.client else "", session_id))


def _session_image(app: ServedApp, session_id: str) -> str:
    sessions = app.sessions()
    found = sessions.get_session(session_id) if sessions is not None and SESSION.fullmatch(session_id) else None
    if found is None:
        raise RefusedError(f"session {session_id[:80]!r} is unknown or has expired; upload the volume again", 404)
    return str(found.image)


def _keep(upload: UploadFile, folder: Path, stem: str) -> Path:
    ending = extension(Path(upload.filename or ".nii.gz").with_name(f"x{Path(upload.filename or '.nii.gz').name}"))
    if ending is None:
        raise RefusedError(f"{Path(upload.filename or '').name[:80]!r}: expected {', '.join(IMAGE_EXTENSIONS)}", 422)
    path = folder / f"{stem}{ending}"
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target)
    return path


def _keep_label(upload: UploadFile, folder: Path, image: str, app: ServedApp) -> Path:
    """OHIF sends raw bytes (.bin) on the image's grid; everything else is an image file."""
    if not (upload.filename or "").endswith(".bin"):
        return _keep(upload, folder, "label")
    raw = folder / "label.bin"
    with raw.open("wb") as target:
        shutil.copyfileobj(upload.file, target)
    reference = image if isinstance(image, Upload) else app.datastore().get_image_uri(image)
    converted = Path(binary_to_image(reference, str(raw)))
    return Path(shutil.move(converted, folder / "label.nii.gz"))


def _labels(router: APIRouter, app: ServedApp) -> None:
    @router.post("/activelearning/{strategy}")
    def next_sample(strategy: str, params: dict[str, Any] | None = None, user: User = USER) -> Any:
        allowed = {k: v for k, v in (params or {}).items() if k == "client_id"}
        return activelearning.sample(strategy, allowed, user.username)

    @router.put("/datastore/label")
    def save_label(
        image: str,
        params: str = Form("{}"),
        tag: str = "final",
        label: UploadFile = File(...),  # noqa: B008 - FastAPI's way
        user: User = ANNOTATOR,
    ) -> Any:
        info = parse(params or "{}")
        if not isinstance(info, dict):
            raise RefusedError("params: expected a JSON object")
        if platform.MONAI_LABEL_AUTH_ENABLE:
            info["user"] = user.username
        with tempfile.TemporaryDirectory(prefix="aslseg-upload-") as folder:
            path = _keep_label(label, Path(folder), image, app)
            saved = app.datastore().save_label(image, str(path), tag or "final", info)
        return {**(app.on_save_label(image, saved) or {}), "image": image, "label": saved}

    @router.put("/datastore/")
    @router.put("/datastore/image")
    def add_image(
        image: str = "",
        params: str = Form("{}"),
        file: UploadFile = File(...),  # noqa: B008 - FastAPI's way
        user: User = ANNOTATOR,
    ) -> Any:
        info = parse(params or "{}")
        if not isinstance(info, dict):
            raise RefusedError("params: expected a JSON object")
        name = Path(file.filename or "")
        case = image or name.name[: -len(extension(name) or "")]
        with tempfile.TemporaryDirectory(prefix="aslseg-upload-") as folder:
            path = _keep(file, Path(folder), safe_name(case, "image id"))
            return {"image": app.datastore().add_image(case, str(path), info)}


def _training(router: APIRouter, app: ServedApp) -> None:
    @router.post("/train/")
    def update_model(user: User = ADMIN) -> Any:
        """OHIF's "Update Model" means all trainers; a round trains them all."""
        result, detail = AsyncTask.run("train", request={"model": "round"})
        return {"round": {"result": result, "detail": detail}}

    @router.post("/train/{model}")
    def start(model: str, enqueue: bool = False, user: User = ADMIN) -> Any:
        if model not in app.info()["trainers"]:
            raise RefusedError(f"no trainer {model[:80]!r}; there are {', '.join(app.info()['trainers'])}", 404)
        return train.run_model(model, None, False, enqueue)

    @router.post("/scoring/{method}")
    def score(method: str, user: User = ANNOTATOR) -> Any:
        if method not in app.info()["scoring"]:
            raise RefusedError(f"no scoring method {method[:80]!r}; there are {', '.join(app.info()['scoring'])}", 404)
        return scoring.run_method(method, None, False)

    @router.post("/batch/infer/{model}")
    def batch(model: str, images: str = "all", params: dict[str, Any] | None = None, user: User = ADMIN) -> Any:
        if model not in app.info()["models"]:
            raise RefusedError(f"no model {model[:80]!r} is ready; there are {', '.join(app.info()['models'])}", 404)
        wanted = {
            "images": (params or {}).get("images", images),
            "label_tag": (params or {}).get("label_tag"),
        }
        validate_params({"save_label": True, "label_tag": wanted["label_tag"]})
        result, detail = AsyncTask.run("batch_infer", request={"model": model, **wanted})
        if result is None:
            raise RefusedError(str(detail), 429)
        return result

    @router.post("/reload")
    def reload(user: User = ADMIN) -> Any:
        """MONAI Label would drop the app and build a crippled one; here it looks at the disk again."""
        app.datastore().refresh()
        return {}

    @router.put("/model/{model}")
    @router.delete("/model/{model}")
    def model_file(model: str, user: User = ADMIN) -> Any:
        raise RefusedError("models are published by rounds only; roll back with `aslseg ledger rollback`", 403)


def _viewer(router: APIRouter, app: ServedApp) -> None:
    folder = Path(ohif.__file__).parent / "static" / "ohif"

    @router.get("/ohif/{path:path}", include_in_schema=False)
    def viewer(path: str, request: Request, user: User = USER) -> Response:
        """OHIF's files; MONAI Label's own route loses those in sub-folders and leaves OHIF to guess port 8000."""
        file = (folder / path).resolve()
        if path and file.is_file() and file.is_relative_to(folder):
            text = mended(file, app.settings.label_set)
            if text is None:
                return FileResponse(file)
            return Response(text.encode("utf-8", "surrogateescape"), media_type="text/javascript")
        page = FileResponse(folder / "index.html")
        here = str(request.base_url)
        if "MONAILABEL_SERVER_URL" not in request.cookies and ADDRESS.fullmatch(here):
            page.headers.append("set-cookie", f"MONAILABEL_SERVER_URL={here}; Path=/; SameSite=Lax")
        return page


def _pages(router: APIRouter, app: ServedApp) -> None:
    def now() -> dict[str, Any]:
        tasks, _ = AsyncTask.status("train", all=True)
        errors = [
            {
                "model": t["request"].get("model"),
                "time": t.get("end_ts"),
                "lines": list(t.get("details", []))[-5:],
            }
            for t in tasks or []
            if t["status"] == "ERROR"
        ]
        return collect(app.settings, app.paths, app.datastore().status(), errors)

    @router.get("/aslseg/status")
    def status(user: User = USER) -> Any:
        return now()

    @router.get("/aslseg/", response_class=HTMLResponse)
    @router.get("/aslseg", response_class=HTMLResponse)
    def page(user: User = USER) -> Any:
        return HTMLResponse(render(now()), headers={"Content-Security-Policy": POLICY})
