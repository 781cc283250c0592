"""Inference, and the sessions in which Slicer uploads volumes that are not in the datastore."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Form, Request, Response, UploadFile
from fastapi.responses import FileResponse
from monailabel.endpoints import infer, session

from aslseg.serving.auth import USER, User
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.inference_request import InferenceRequest, scan_path
from aslseg.serving.mask_encoding import gzipped_bytes
from aslseg.serving.params import InferenceParams, parse_json, validate_params
from aslseg.serving.routes.uploads import PREFIX, save_label_upload, save_upload, upload_extension, upload_folder
from aslseg.volume.untrusted import Limits, check_untrusted

if TYPE_CHECKING:
    from aslseg.serving.app import ServedApp

WORTH_COMPRESSING = 200_000
SESSION = re.compile(r"[0-9a-f-]{8,64}")


def add_routes(router: APIRouter, app: ServedApp) -> None:
    """Add the routes to a router."""
    _inference(router, app)
    _sessions(router, app)


def _inference(router: APIRouter, app: ServedApp) -> None:
    @router.post("/infer/{model}")
    def run(
        background_tasks: BackgroundTasks,
        http: Request,
        model: str,
        image: str = "",
        session_id: str = "",
        params: Annotated[str, Form()] = "{}",
        file: UploadFile | None = None,
        label: UploadFile | None = None,
        output: infer.ResultType | None = None,
        user: User = USER,
    ) -> Any:
        if output == infer.ResultType.dicom_seg:
            raise RefusedError("output=dicom_seg is not offered; save the label instead, which makes a DICOM SEG")
        found = validate_params(parse_json(params or "{}"))
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        background_tasks.add_task(shutil.rmtree, folder, ignore_errors=True)
        try:
            path, case = _scan(app, image, session_id, file, folder)
            request = InferenceRequest(
                model,
                path,
                found,
                case,
                label_file=save_label_upload(label, folder) if label is not None else None,
                client=_client(found, user, http, session_id),
                temporary=case is None and not session_id,
            )
            result = app.infer(request)
        except BaseException:
            # background tasks run only after an answer that succeeded
            shutil.rmtree(folder, ignore_errors=True)
            raise
        reply = infer.send_response(app.datastore(), result, output, background_tasks)
        return _compressed(reply, http.headers.get("accept-encoding", ""))

    @router.post("/infer/")
    def run_without_model(
        background_tasks: BackgroundTasks,
        image: str = "",
        session_id: str = "",
        params: Annotated[str, Form()] = "{}",
        user: User = USER,
    ) -> Any:
        """Slicer's own request on the next sample, while none of the models that it lists is automatic."""
        path, case = _scan(app, image, session_id, None, Path())
        found = validate_params(parse_json(params or "{}"))
        result = app.infer(InferenceRequest("", path, found, case))
        return infer.send_response(app.datastore(), result, None, background_tasks)

    @router.post("/infer/wsi/{model}")
    @router.post("/infer/wsi_v2/{model}")
    def pathology(model: str, user: User = USER) -> Any:
        raise RefusedError("ASLseg works on volumes, not on whole-slide images; use /infer", 404)


def _sessions(router: APIRouter, app: ServedApp) -> None:
    @router.put("/session/")
    def new_session(
        background_tasks: BackgroundTasks,
        files: list[UploadFile],
        uncompress: bool = False,
        expiry: int = 0,
        user: User = USER,
    ) -> Any:
        if uncompress:
            raise RefusedError("archives are not unpacked; upload the volume itself")
        if len(files) != 1:
            raise RefusedError("expected one volume in a file of its own; DICOM goes through a PACS", 422)
        upload_extension(files[0])
        with upload_folder() as folder:
            check_untrusted(save_upload(files[0], Path(folder), "image"), Limits(app.settings.max_upload_voxels))
        files[0].file.seek(0)
        return session.create_session(background_tasks, False, expiry, files)


def _scan(
    app: ServedApp, image: str, session_id: str, file: UploadFile | None, folder: Path
) -> tuple[Path, str | None]:
    """The scan of a request, and its id if it is in the datastore."""
    if session_id:
        return _session_image(app, session_id), None
    if file is not None:
        path = save_upload(file, folder, "image")
        check_untrusted(path, Limits(app.settings.max_upload_voxels))
        return path, None
    if not image:
        raise RefusedError("expected an image id, a file or a session_id, got none of them")
    return scan_path(app.datastore(), image), image


def _session_image(app: ServedApp, session_id: str) -> Path:
    sessions = app.sessions()
    found = sessions.get_session(session_id) if sessions is not None and SESSION.fullmatch(session_id) else None
    if found is None:
        raise RefusedError(f"session {session_id[:80]!r} is unknown or has expired; upload the volume again", 404)
    return Path(found.image)


def _client(params: InferenceParams, user: User, http: Request, session_id: str) -> str:
    """Whose clicks: Slicer's default name stands for everybody, but with the address people at two desks stay two."""
    address = http.client.host if http.client else ""
    return "|".join((params.client_id or user.username, user.username, address, session_id))


def _compressed(reply: Any, accepted: str) -> Any:
    """A large reply, compressed for clients that accept it: OHIF asks for raw voxels, tens of megabytes."""
    if "gzip" not in accepted or not isinstance(reply, Response):
        return reply
    content = Path(reply.path).read_bytes() if isinstance(reply, FileResponse) else bytes(reply.body)
    if len(content) < WORTH_COMPRESSING:
        return reply
    headers = {k: v for k, v in reply.headers.items() if k in ("content-type", "content-disposition")}
    return Response(gzipped_bytes(content), headers=headers | {"content-encoding": "gzip", "vary": "accept-encoding"})
