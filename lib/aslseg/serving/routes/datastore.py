"""Scans and labels: upload, download, delete, and what is known about them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Form, Response, UploadFile
from fastapi.responses import StreamingResponse
from monailabel.endpoints import activelearning
from monailabel.endpoints import datastore as endpoint

from aslseg.errors import AslsegError
from aslseg.serving.auth import ADMIN, ANNOTATOR, USER, User, authenticated_name
from aslseg.serving.http_errors import RefusedError, kept_name, safe_name
from aslseg.serving.params import parse_object
from aslseg.serving.routes.uploads import label_extension, save_unjudged, save_upload, upload_folder
from aslseg.volume.io import extension

if TYPE_CHECKING:
    from aslseg.serving.app import ServedApp

PIECE = 1 << 20
LONGEST_NAME = 256
LONGEST_KEPT = 10_000
"""Characters of parameters that cannot be read."""


def add_routes(router: APIRouter, app: ServedApp) -> None:
    """Add the routes to a router."""
    _entries(router, app)
    _uploads(router, app)
    _infos(router, app)
    _deletions(router, app)

    @router.post("/activelearning/{strategy}")
    def next_sample(strategy: str, params: dict[str, Any] | None = None, user: User = USER) -> Any:
        name = (params or {}).get("client_id")
        _require_name("client_id", name)
        return activelearning.sample(strategy, {"client_id": name} if name else {}, user.username)

    @router.get("/datastore/dataset")
    def dataset(limit_cases: int | None = None, user: User = ANNOTATOR) -> Any:
        """All scans with their human labels. The archive has no name on the disk, so that nothing can be left there."""
        archive = tempfile.TemporaryFile(prefix="aslseg-")  # noqa: SIM115 - closed when it has been sent
        try:
            app.datastore().write_dataset(archive, limit_cases)
        except BaseException:
            archive.close()
            raise
        headers = {"content-disposition": 'attachment; filename="dataset.zip"'}
        return StreamingResponse(_pieces(archive), media_type="application/zip", headers=headers)


def _entries(router: APIRouter, app: ServedApp) -> None:
    @router.get("/datastore/")
    def entries(output: endpoint.ResultType = endpoint.ResultType.stats, user: User = USER) -> Response:
        """As MONAI Label's. Text is made here: FastAPI would make it on the event loop, while all others wait."""
        store = app.datastore()
        if output == endpoint.ResultType.all:
            text = store.json_text()
        else:
            text = json.dumps(store.datalist() if output == endpoint.ResultType.train else store.status())
        return Response(text, media_type="application/json")


def _uploads(router: APIRouter, app: ServedApp) -> None:
    @router.put("/datastore/label")
    def save_label(
        background_tasks: BackgroundTasks,
        label: UploadFile,
        image: str = "",
        params: Annotated[str, Form()] = "{}",
        tag: str = "final",
        user: User = ANNOTATOR,
    ) -> Any:
        tag = tag or "final"
        with upload_folder() as folder:
            path = save_unjudged(label, Path(folder))
            with _kept_if_refused(app.datastore(), image, tag, path, params, user):
                info = _signed(parse_object(params), user)
                label_extension(label)
            saved = app.datastore().save_label(image, str(path), tag, info)
        app.leases.release(image)
        background_tasks.add_task(app.on_save_label, image, saved)
        return {"image": image, "label": saved}

    @router.put("/datastore/")
    @router.put("/datastore/image")
    def add_image(
        file: UploadFile, image: str = "", params: Annotated[str, Form()] = "{}", user: User = ANNOTATOR
    ) -> Any:
        info = _signed(parse_object(params), user)
        name = Path(file.filename or "")
        case = safe_name(image or name.name[: -len(extension(name) or "")], "image id")
        with upload_folder() as folder:
            return {"image": app.datastore().add_image(case, str(save_upload(file, Path(folder), case)), info)}


def _infos(router: APIRouter, app: ServedApp) -> None:
    @router.put("/datastore/image/info")
    def image_info(image: str, info: Annotated[str, Form()] = "{}", user: User = ANNOTATOR) -> Any:
        return app.datastore().update_image_info(image, _signed(parse_object(info, "info"), user))

    @router.put("/datastore/label/info")
    def label_info(label: str, tag: str, info: Annotated[str, Form()] = "{}", user: User = ANNOTATOR) -> Any:
        return app.datastore().update_label_info(label, tag, _signed(parse_object(info, "info"), user))

    @router.put("/datastore/updatelabelinfo")
    def label_params(label: str, tag: str, params: Annotated[str, Form()] = "{}", user: User = ANNOTATOR) -> Any:
        return app.datastore().update_label_info(label, tag, _signed(parse_object(params), user))


def _deletions(router: APIRouter, app: ServedApp) -> None:
    @router.delete("/datastore/")
    @router.delete("/datastore/image")
    def remove_image(id: str, user: User = ADMIN) -> Any:  # noqa: A002 - MONAI Label's name
        app.datastore().remove_image(id, by=authenticated_name(user))
        return {}

    @router.delete("/datastore/label")
    def remove_label(id: str, tag: str, user: User = ADMIN) -> Any:  # noqa: A002 - MONAI Label's name
        app.datastore().remove_label(id, tag, by=authenticated_name(user))
        return {}


@contextmanager
def _kept_if_refused(store: Any, image: str, tag: str, source: Path, params: str, user: User) -> Iterator[None]:
    """Keep a label that the block refuses for what came with it, as the datastore keeps one that it refuses itself."""
    try:
        yield
    except AslsegError:
        store.require_folder()  # nothing is kept in the place of a disk that is away
        info = {"params": params[:LONGEST_KEPT], "user": authenticated_name(user)}
        case = kept_name(image)
        with store.saved.refusals(case, kept_name(tag), source, info), store.kept.parked(case, source, info):
            raise


def _signed(info: dict[str, Any], user: User) -> dict[str, Any]:
    """What a client wrote, with the authenticated name in place of any that it gave itself."""
    for field in ("user", "client_id"):
        _require_name(field, info.get(field))
    name = authenticated_name(user)
    return {k: v for k, v in info.items() if k != "user"} | ({"user": name} if name else {})


def _require_name(field: str, name: Any) -> None:
    if name is not None and not (isinstance(name, str) and len(name) <= LONGEST_NAME):
        raise RefusedError(f"{field}: expected a name of at most {LONGEST_NAME} characters")


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while piece := file.read(PIECE):
            yield piece
