"""Training, scoring and batch inference: what runs in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from monailabel.endpoints import scoring, train
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import processes

from aslseg.rounds.scheduling.lock import round_lock, round_runs
from aslseg.rounds.scheduling.schedule import utc_now
from aslseg.serving.auth import ADMIN, ANNOTATOR, User, authenticated_name
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.params import validate_params

if TYPE_CHECKING:
    from aslseg.serving.app import ServedApp


def add_routes(router: APIRouter, app: ServedApp) -> None:
    """Add the routes to a router."""
    _training(router, app)
    _others(router, app)


def _training(router: APIRouter, app: ServedApp) -> None:
    def start_round(model: str, enqueue: bool, user: User) -> Any:
        if not enqueue and not processes("train") and app.paths.studies is not None:
            # the process that trains would import torch before it found the lock taken
            with round_lock(app.paths.home):
                pass
        # before it runs: the schedule ends what runs after a stop
        app.nights.note_train(authenticated_name(user), utc_now())
        return train.run_model(model, None, False, enqueue)

    @router.post("/train/")
    def update_model(params: dict[str, Any] | None = None, user: User = ADMIN) -> Any:
        """OHIF's "Update Model" sends a JSON object and means all trainers; a round trains them all."""
        if params is None:
            raise RefusedError("expected a JSON object; POST /train/round starts a round")
        return {"round": {"result": start_round("round", False, user), "detail": None}}

    @router.post("/train/{model}")
    def start(model: str, enqueue: bool = False, user: User = ADMIN) -> Any:
        _known(model, app.trainer_names(), "trainer")
        return start_round(model, enqueue, user)

    @router.delete("/train/")
    def stop(user: User = ADMIN) -> Any:
        """End the training; a round that a person stops starts again by *Train* or in the next night only."""
        try:
            if processes("train") or round_runs(app.paths.home):
                # before it ends: the schedule would start it again
                app.nights.note_stop(authenticated_name(user), utc_now())
        finally:
            ended = train.stop()
        return ended


def _others(router: APIRouter, app: ServedApp) -> None:
    @router.post("/scoring/{method}")
    def score(method: str, user: User = ANNOTATOR) -> Any:
        _known(method, app.scoring_names(), "scoring method")
        return scoring.run_method(method, None, False)

    @router.post("/batch/infer/{model}")
    def batch(model: str, images: str = "all", params: dict[str, Any] | None = None, user: User = ADMIN) -> Any:
        _known(model, app.model_names(), "model")
        given = params or {}
        tag = validate_params({"save_label": True, "label_tag": given.get("label_tag")}).label_tag
        request = {"model": model, "images": _images(given.get("images", images)), "label_tag": tag}
        result, detail = AsyncTask.run("batch_infer", request=request)
        if result is None:
            raise RefusedError(str(detail), 429)
        return result

    @router.post("/reload")
    def reload(user: User = ADMIN) -> Any:
        """MONAI Label would drop the app and build another one without routes of ours; this reads the disk again."""
        app.datastore().refresh()
        return {}

    @router.put("/model/{model}")
    @router.delete("/model/{model}")
    def model_file(model: str, user: User = ADMIN) -> Any:
        raise RefusedError("models are published by rounds only; roll back with `aslseg ledger rollback`", 403)


def _known(name: str, known: list[str], what: str) -> None:
    if name not in known:
        raise RefusedError(f"no {what} {name[:80]!r}; there are {', '.join(known)}", 404)


def _images(wanted: Any) -> Any:
    ids = isinstance(wanted, list) and all(isinstance(name, str) for name in wanted)
    if not ids and wanted not in ("all", "labeled", "unlabeled"):
        raise RefusedError(f"images: expected all, labeled, unlabeled or a list of ids, got {str(wanted)[:80]!r}")
    return wanted
