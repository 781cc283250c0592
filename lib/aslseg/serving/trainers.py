"""A round, or one of its stages, as something the clients can start, watch and stop."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from aslseg.errors import NotEnoughCasesError
from aslseg.rounds.scheduling.brake import Brake, RoundBrake
from aslseg.rounds.scheduling.progress import read_progress
from aslseg.rounds.scheduling.schedule import clock_text, finish_text, utc_now
from aslseg.serving.priority import ROUND, lower_priority
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)

PARTS = 100


class Trainer(TrainTask):
    """One entry of the clients' training menu. Runs in a sub-process that MONAI Label may kill at any moment.

    It runs with a lower priority than the annotators' clicks, and waits between its steps while somebody clicks.

    Args:
        settings: Those of the server; a sub-process reads the same.
        paths: The studies folder.
        work: The function that trains, called with the studies folder, the settings, ``report`` and ``brake``.
        description: Shown to annotators.
    """

    def __init__(self, settings: Settings, paths: Paths, work: Callable[..., dict[str, Any]], description: str) -> None:
        super().__init__(description)
        self.settings, self.paths, self.work = settings, paths, work

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train as the settings say.

        Args:
            request: ``night`` and ``until`` (UTC, ISO 8601) from the schedule; parameters of clients do not get here.
            datastore: Not used.

        Raises:
            NotEnoughCasesError: The studies are on a DICOMweb server.
            AslsegError: As the work.
        """
        if self.paths.studies is None:
            raise NotEnoughCasesError(
                "rounds need the scans in a local studies folder; export them from the PACS, run "
                "`aslseg round --studies DIR`, and give this server the same model_dir"
            )
        lower_priority(ROUND, whole=True)
        last, server = -1, os.getppid()

        def report(done: float, total: float, **shown: Any) -> None:
            nonlocal last
            if os.getppid() != server:
                raise SystemExit("the server stopped; the next round continues this one")
            percent = int(100 * done / total) if total else 100
            if percent != last:
                last = percent
                logger.info("%d %% %s", percent, _text(shown, self.settings))

        until = request.get("until")
        brake = RoundBrake(self.paths.home, datetime.fromisoformat(until) if until else None)
        night = {"night": request["night"]} if request.get("night") else {}
        return self.work(self.paths.studies, self.settings, report=report, brake=brake, **night)

    def stats(self) -> dict[str, Any]:
        """Progress in the form that Slicer and OHIF draw: ``epoch`` of ``total_epochs``, ``best_metric``."""
        return trainer_stats(read_progress(self.paths.home / "progress.json"), self.settings)


def trainer_stats(progress: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The progress file in the form that MONAI Label's clients expect, in hundredths."""
    if progress.get("state", "none") == "none":
        return {}
    done = progress["state"] == "done"
    part = 1.0 if done else float(progress.get("part") or 0)
    numbers = progress.get("numbers") or {}
    metric = next((v for k, v in numbers.items() if "dice" in k.lower() and isinstance(v, int | float)), 0)
    return {
        "epoch": round(part * PARTS),
        "total_epochs": PARTS,
        "best_metric": round(float(metric), 4),
        "total_time": f"{round(sum((progress.get('seconds') or {}).values()))} s",
        "eta": f"{round(progress.get('eta') or 0)} s",
        "finish": finish_text(progress, settings),
        "state": progress["state"],
        "stage": progress.get("stage", ""),
        "round": progress.get("round"),
    }


def _text(shown: Mapping[str, Any], settings: Settings) -> str:
    shown = dict(shown)
    eta = shown.pop("eta", None)
    if eta is not None:
        shown["done"] = f"about {clock_text(utc_now() + timedelta(seconds=eta), settings)}"
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def full_round(
    studies: Path, settings: Settings, report: ProgressCallback, brake: Brake, night: str | None = None
) -> dict[str, Any]:
    """A whole round, or that of a night; see :mod:`aslseg.rounds.run` and :mod:`aslseg.rounds.nightly`."""
    # imported when it runs: MONAI Label builds the trainers in every process
    from aslseg.rounds.nightly import run_night
    from aslseg.rounds.run import run_round

    if night is not None:
        return run_night(studies, settings, report, night=night, brake=brake)
    return run_round(studies, settings, report=report, brake=brake)


def train_ssl(studies: Path, settings: Settings, report: ProgressCallback, brake: Brake) -> dict[str, Any]:
    """The SSL network only; published if it passes the gate."""
    return _train("ssl", studies, settings, report, brake)


def train_sam(studies: Path, settings: Settings, report: ProgressCallback, brake: Brake) -> dict[str, Any]:
    """SAM only; published if it passes the gate."""
    return _train("sam", studies, settings, report, brake)


def train_adapter(studies: Path, settings: Settings, report: ProgressCallback, brake: Brake) -> dict[str, Any]:
    """The adaptation network only; published if it passes the gate."""
    return _train("adapter", studies, settings, report, brake)


def _train(kind: str, studies: Path, settings: Settings, report: ProgressCallback, brake: Brake) -> dict[str, Any]:
    from aslseg.rounds.run import train_stage

    return train_stage(kind, studies, settings, report=report, brake=brake)
