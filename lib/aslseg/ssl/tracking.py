"""Training curves for TensorBoard and MLflow, by the setting ``tracking``; files only, nothing leaves the machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock
from ignite.engine import Engine, Events
from ignite.handlers import MLflowLogger, TensorboardLogger

from aslseg.errors import BadSettingsError
from aslseg.settings import Settings

logger = logging.getLogger(__name__)

EVERY = 10
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


def check(tracking: str) -> None:
    """Check that the packages for a value of the setting ``tracking`` are installed.

    Raises:
        BadSettingsError: One is not.
    """
    for name in _wanted(tracking):
        if find_spec(PACKAGES[name]) is None:
            raise BadSettingsError(
                f"tracking is {tracking!r}, but {PACKAGES[name]} is not installed; "
                "pip install 'aslseg[tracking]', or set tracking none"
            )


def _wanted(tracking: str) -> list[str]:
    return [] if tracking == "none" else tracking.split("+")


@contextmanager
def tracked(engine: Engine, settings: Settings, folder: Path, name: str, first: int) -> Iterator[None]:
    """Write every tenth step's numbers while the engine runs; a resumed run goes on in its curves.

    Args:
        engine: Its output is a dict of numbers.
        settings: ``tracking``; all settings become the MLflow run's parameters.
        folder: Gets ``tensorboard/NAME/`` and ``mlflow.sqlite``.
        name: Of the run; the same for a resumed one.
        first: Steps done before.

    Raises:
        BadSettingsError: A package is missing.
    """
    check(settings.tracking)
    wanted = _wanted(settings.tracking)
    with ExitStack() as stack:
        loggers: list[Any] = []
        if "tensorboard" in wanted:
            log_dir = folder / "tensorboard" / name
            # what a killed process wrote after its last checkpoint is written again
            board = TensorboardLogger(log_dir=str(log_dir), purge_step=first + 1 if first else None)
            stack.callback(board.close)
            loggers.append(board)
        if "mlflow" in wanted:
            loggers.append(stack.enter_context(_mlflow(settings, folder, name)))
        for one in loggers:
            one.attach_output_handler(
                engine,
                Events.ITERATION_COMPLETED(every=EVERY),
                tag="train",
                output_transform=lambda numbers: numbers,
                global_step_transform=lambda engine, _: first + engine.state.iteration,
            )
        if loggers:
            logger.info("tracking %s in %s as %s", settings.tracking, folder, name)
        yield


@contextmanager
def _mlflow(settings: Settings, folder: Path, name: str) -> Iterator[MLflowLogger]:
    """The run of that name in the local database, made or gone on with; it ends FINISHED, or FAILED after an error."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    folder.mkdir(parents=True, exist_ok=True)
    # several processes must not make one database, or bring it up to date, at the same time
    with FileLock(folder / "mlflow.lock"):
        _start_run(mlflow, settings, folder, name)
    status = "FAILED"
    try:
        yield MLflowLogger()
        status = "FINISHED"
    finally:
        mlflow.end_run(status)


def _start_run(mlflow: Any, settings: Settings, folder: Path, name: str) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.sqlite').resolve()}")
    if mlflow.get_experiment_by_name("aslseg") is None:
        mlflow.create_experiment("aslseg", artifact_location=(folder / "mlflow").resolve().as_uri())
    experiment = mlflow.set_experiment("aslseg")
    quoted = name.replace("'", "")
    earlier: Any = mlflow.search_runs(
        [experiment.experiment_id], f"attributes.run_name = '{quoted}'", output_format="list"
    )
    if earlier:
        mlflow.start_run(run_id=earlier[0].info.run_id)
    else:
        mlflow.start_run(run_name=quoted)
        mlflow.log_params({k: v for k, v in settings.model_dump().items() if v != ""})
