"""The parts of a MONAI Label app that make it safe to leave running; apps/aslseg/main.py says what it serves."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from monailabel.config import settings as platform
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import processes
from monailabel.utils.sessions import SessionInfo, Sessions
from starlette.middleware import Middleware

from aslseg import __version__
from aslseg.cases.scan_checks import ScanChecks
from aslseg.errors import AslsegError, BadSettingsError
from aslseg.models.kinds import PUBLISHED_KINDS
from aslseg.models.published import find_published
from aslseg.review.page import prepare
from aslseg.rounds.feedback.corrections import record_checked
from aslseg.rounds.label_files.label_values import require_same_values
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.scheduling.brake import answering
from aslseg.rounds.scheduling.nights import Nights
from aslseg.serving.auth import install_auth
from aslseg.serving.dicomweb_datastore import connect
from aslseg.serving.embed import embed_studies
from aslseg.serving.guard import install_guard
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.infer_tasks import BatchInference
from aslseg.serving.inference_request import InferenceRequest, request_from_mapping
from aslseg.serving.login_first import install_login_first
from aslseg.serving.logs import configure_logs
from aslseg.serving.made_ready import keep_ready
from aslseg.serving.metrics import Metrics, RequestTimer, watch_studies
from aslseg.serving.network_access import bound_host, require_safe_exposure
from aslseg.serving.replies import answer, without_model
from aslseg.serving.scan_watch import watch_headers
from aslseg.serving.scheduler import Scheduler, training_runs
from aslseg.serving.strategies import Leases
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.settings import Paths, load_settings
from aslseg.settings.paths import require_writable
from aslseg.volume.untrusted import start_readers

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.001
"""How long a thread may compute while others wait for their turn. Saving a label reads and writes a hundred times, and
waits for a turn after each; Python's 5 ms would add up to half a second beside a thread that computes."""


class ServedApp(MONAILabelApp):
    """Settings, datastore, sessions and errors; a subclass adds models, trainers, strategies and scoring.

    Constructing it loads no model and starts nothing: MONAI Label builds the app again in every sub-process.

    Args:
        app_dir: Folder of main.py.
        studies: Studies folder or DICOMweb address.
        conf: ``--conf`` pairs.
    """

    studies: str

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, str]) -> None:
        refuse_python_of_the_current_folder()
        try:
            self.settings, self.origin = load_settings(conf)
            require_writable(self.settings, "home")
        except BadSettingsError as error:
            refuse_to_start(str(error), 2)
        self.paths = Paths(self.settings, studies)
        self.nights = Nights(Ledger(self.paths.ledger), self.settings)
        self.leases = Leases()
        self.scan_checks = ScanChecks(self.settings.max_voxels)
        self.metrics = Metrics()
        try:
            super().__init__(
                app_dir,
                studies,
                dict(conf or {}),
                name="ASLseg",
                description="Semi-supervised segmentation with SAM in the loop. Research use only",
                version=__version__,
                labels=list(self.settings.label_set.names),
            )
        except AslsegError as error:
            refuse_to_start(str(error), 1)
        # rounds write the scores; a sub-process for every click on "next sample" is no help
        self._auto_update_scoring = False

    # where data is stored

    def init_datastore(self) -> Datastore:
        """The studies folder, or the PACS."""
        if self.paths.studies is None:
            self.studies = self.studies.rstrip("/").strip()
            return connect(self.studies, self.settings, self.paths)
        store = StudiesDatastore(self.studies, self.settings, self.paths)
        self.paths.remember_models()
        return store

    def _load_sessions(self, load: bool = False) -> Sessions | None:
        path = platform.MONAI_LABEL_SESSION_PATH or str(self.paths.home / "sessions")
        return SafeSessions(path, platform.MONAI_LABEL_SESSION_EXPIRY) if load else None

    # requests of clients

    def info(self) -> dict[str, Any]:
        """As MONAI Label's; the description names models that are not trained, and a datastore that was recovered."""
        meta = super().info()
        hidden = [name for name, task in self._infers.items() if not task.is_valid()]
        if hidden:
            meta["description"] += f". Not trained yet, run a round: {', '.join(hidden)}"
        recovered = getattr(self.datastore(), "recovered", "")
        if recovered:
            meta["description"] += f". {recovered}"
        return meta

    def model_names(self) -> list[str]:
        """Models that can be asked now."""
        return [name for name, task in self._infers.items() if task.is_valid()]

    def trainer_names(self) -> list[str]:
        """Entries of the training menu."""
        return list(self._trainers)

    def scoring_names(self) -> list[str]:
        """Scoring methods."""
        return list(self._scoring_methods)

    def infer(
        self, request: InferenceRequest | Mapping[str, Any], datastore: Datastore | None = None
    ) -> dict[str, Any]:
        """Answer a request; see :func:`aslseg.serving.replies.answer`. MONAI Label's own callers pass a dictionary."""
        store = datastore or self.datastore()
        if not isinstance(request, InferenceRequest):
            request = request_from_mapping(request, store)
        with answering(self.paths.home) if self.paths.studies is not None else nullcontext():
            if not request.model:
                return without_model(request, self.settings, self.paths)
            result = answer(self._infers, request, store)
        self.metrics.observe_stages(request.model, result["params"].get("latencies", {}))
        return result

    def init_batch_infer(self) -> BatchInference:
        """One case after the other; a case that fails does not stop the rest."""
        return BatchInference()

    def infer_wsi(self, request: dict[str, Any], datastore: Datastore | None = None) -> NoReturn:
        """Whole-slide images are for other apps."""
        raise RefusedError("ASLseg works on volumes, not on whole-slide images; use /infer", 404)

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """The next scan to look at."""
        strategy = request.get("strategy") or "random"
        if strategy not in self._strategies:
            raise RefusedError(f"no strategy {str(strategy)[:80]!r}; there are {', '.join(self._strategies)}", 404)
        return super().next_sample(request)

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run a scoring method."""
        if request.get("method") not in self._scoring_methods:
            raise RefusedError(f"no such scoring method; there are {', '.join(self._scoring_methods)}", 404)
        return super().scoring(request, datastore)

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train in this process, then put the scores where clients see them.

        In a sub-process an error ends it with its message as the last line, which clients show.
        """
        try:
            result = super().train(request)
            self.scoring({"method": "agreement"})
            if request.get("model") == "round" and "ended" not in result:
                self._embed_ahead()
            return result
        except AslsegError as error:
            if self._server_mode:
                raise
            logger.error("%s", error)
            sys.exit(1)

    def _embed_ahead(self) -> None:
        """Embeddings of the scans that come next; a round that is done stays done without them."""
        if not self.settings.embed_cases or self.paths.studies is None:
            return
        try:
            embed_studies(self.paths.studies, self.settings, self.settings.embed_cases)
        except (AslsegError, OSError, RuntimeError, MemoryError):
            logger.exception("embeddings were not made ahead; clicks make them when they come")

    def async_scoring(self, method: str | None, params: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Score only when asked for, and never queue a second time."""
        if not method or processes("scoring"):
            return {}
        return AsyncTask.run("scoring", request={"method": method}, params=params)[0]

    def _local_request(self, url: str, params: Any, action: str) -> None:
        logger.info("%s is left to the server; a process of its own does not call it", action)

    # without a request

    def on_init_complete(self) -> None:
        """In the server only: who may connect, routes, log, session clean-up, and the first round."""
        from monailabel.app import app as host

        from aslseg.serving.routes import install
        from aslseg.serving.routes.uploads import remove_stale_uploads

        try:
            require_safe_exposure(bound_host(sys.argv), self.settings)
            require_same_values(self.nights.ledger, self.paths.studies, self.settings)
            install_auth(host, self.settings)
        except AslsegError as error:
            refuse_to_start(str(error), 2 if isinstance(error, BadSettingsError) else 1)
        configure_logs(self.settings, self.paths, self._is_case)
        super().on_init_complete()
        install(host, self)
        install_guard(host, self.settings)
        install_login_first(host)
        host.user_middleware.insert(0, Middleware(RequestTimer, metrics=self.metrics))
        watch_studies(self.metrics, self.paths, self.datastore())
        if self.paths.studies is not None:
            watch_headers(self.paths.studies, self.scan_checks)
            keep_ready(self.datastore().prepare_text, lambda: prepare(self.settings, self.paths))
        remove_stale_uploads()
        start_readers()
        self.start_first_round()
        self._follow_schedule()
        sys.setswitchinterval(SWITCH_SECONDS)
        # a full collection would otherwise walk through all that was imported, with every request waiting
        gc.collect()
        gc.freeze()

    def _follow_schedule(self) -> None:
        """Start rounds by ``night`` and ``after_labels``, if the settings have one of them."""
        if not (self.settings.night or self.settings.after_labels):
            return
        if self.paths.studies is None:
            logger.warning(
                "night and after_labels start nothing here: rounds need a local studies folder. Run `aslseg nightly "
                "--studies DIR` on exports of the scans, with the same model_dir"
            )
            return
        Scheduler(
            self.paths,
            self.nights,
            start=lambda request: AsyncTask.run("train", request=request),
            running=training_runs,
            stop=lambda: AsyncTask.stop("train"),
        ).begin()

    def _is_case(self, word: str) -> bool:
        """Whether a word in the log is the id of a scan; a PACS gives UIDs, which name nobody."""
        has_case = getattr(self.datastore(), "has_case", None)
        return bool(has_case and has_case(word))

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """After a label was saved and its sender has an answer; with nothing trained yet, training can begin."""
        try:
            record_checked(self.paths, self.settings, image_id)
        except (AslsegError, OSError):  # the label is saved; the next round compares it
            logger.exception("the promoted mask of a saved label was not compared with it")
        self.start_first_round()
        return {}

    def cleanup_sessions(self) -> None:
        """A broken session folder must not end MONAI Label's clean-up thread."""
        try:
            super().cleanup_sessions()
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("sessions were not cleaned up: %s", error)

    def start_first_round(self) -> None:
        """Start training in the background if nothing is published, something is labelled and nothing runs."""
        where = f"http://127.0.0.1:{platform.MONAI_LABEL_SERVER_PORT}/aslseg/"
        if any(find_published(self.paths, kind) for kind in PUBLISHED_KINDS):
            return
        if self.paths.studies is None:
            logger.warning("no models yet, and rounds need a local studies folder; only 'sam' works. See %s", where)
        elif not self.settings.first_round:
            logger.info("no models yet and first_round is off; start the trainer 'round' when you like")
        elif not self.datastore().get_labeled_images():
            logger.warning(
                "no models and no human label yet: label one scan (model 'sam' works already); then training starts "
                "by itself. See %s",
                where,
            )
        elif self.nights.held() is not None:
            logger.info("no models yet; training was stopped by hand, so nothing starts before Train or a night")
        elif not processes("train"):
            AsyncTask.run("train", request={"model": "round"})
            logger.info("no models yet: the first round runs in the background. Its progress: %s", where)


class SafeSessions(Sessions):
    """Uploaded volumes, in a folder of this server's own."""

    def remove_expired(self) -> int:
        """MONAI Label's version fails on a folder without its description; such a folder is removed."""
        root = Path(self.store_path)
        for folder in root.iterdir() if root.is_dir() else []:
            if folder.is_dir() and not (folder / "meta.info").exists() and time.time() - folder.stat().st_mtime > 3600:
                shutil.rmtree(folder, ignore_errors=True)
        return super().remove_expired()

    def get_session(self, session_id: str, update_ts: bool = True, fetch_cache: bool = True) -> SessionInfo | None:
        """A session by its id, which is no path."""
        if os.path.basename(session_id) != session_id or session_id.startswith("."):
            return None
        return super().get_session(session_id, update_ts, fetch_cache)


def refuse_to_start(message: str, code: int) -> NoReturn:
    """Say why on stderr and end the process with this exit code.

    The app is built inside the web server's start-up, where SystemExit becomes a traceback and exit code 3.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.write(f"ASLseg does not start: {message}\n")
    sys.stderr.flush()
    os._exit(code)


def refuse_python_of_the_current_folder() -> None:
    """Trainings, which are processes of MONAI Label, execute no Python files of the folder in which it was started.

    That may be the studies folder. MONAI Label leaves an empty entry in ``PYTHONPATH``, which means that folder.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, entries))
