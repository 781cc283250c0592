"""What each trainer runs, imported only when it runs: MONAI Label builds the trainers in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aslseg.settings import Settings
from aslseg.types import ProgressCallback


def full_round(studies: Path, settings: Settings, report: ProgressCallback) -> dict[str, Any]:
    """A whole round; see :func:`aslseg.rounds.run.run_round`."""
    from aslseg.rounds.run import run_round

    return run_round(studies, settings, report=report)


def train_ssl(studies: Path, settings: Settings, report: ProgressCallback) -> dict[str, Any]:
    """The SSL network only; published if it passes the gate."""
    return _train("ssl", studies, settings, report)


def train_sam(studies: Path, settings: Settings, report: ProgressCallback) -> dict[str, Any]:
    """SAM only; published if it passes the gate."""
    return _train("sam", studies, settings, report)


def train_adapter(studies: Path, settings: Settings, report: ProgressCallback) -> dict[str, Any]:
    """The adaptation network only; published if it passes the gate."""
    return _train("adapter", studies, settings, report)


def _train(kind: str, studies: Path, settings: Settings, report: ProgressCallback) -> dict[str, Any]:
    from aslseg.rounds.run import train_stage

    return train_stage(kind, studies, settings, report=report)
