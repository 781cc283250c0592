"""Trainers: what clients see of them, and when they end."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aslseg.errors import NotEnoughCasesError
from aslseg.serving import trainers
from aslseg.serving.trainers import Trainer, trainer_stats
from aslseg.settings import Paths, load_settings
from own_thread import for_this_thread

SETTINGS, _ = load_settings({}, env={})


def test_progress_in_the_words_of_the_clients() -> None:
    progress = {
        "state": "running",
        "part": 0.42,
        "eta": 33.4,
        "stage": "sam",
        "round": 2,
        "seconds": {"ssl": 10.4},
        "finish": "2026-11-27T02:40:00+00:00",
    }
    stats = trainer_stats({**progress, "numbers": {"loss": 1.0, "dice": 0.81}}, SETTINGS)
    assert (stats["epoch"], stats["total_epochs"], stats["best_metric"], stats["eta"]) == (
        42,
        100,
        0.81,
        "33 s",
    )
    berlin, _ = load_settings({"time_zone": "Europe/Berlin"}, env={})
    assert trainer_stats(progress, berlin)["finish"] == "about 03:40"
    assert trainer_stats({"state": "none"}, SETTINGS) == {}
    assert trainer_stats({"state": "done"}, SETTINGS)["epoch"] == 100


def test_a_pacs_is_no_studies_folder() -> None:
    paths = Paths(SETTINGS, "http://127.0.0.1:1/dicom-web")
    trainer = Trainer(SETTINGS, paths, lambda *_, **__: {}, "")
    with pytest.raises(NotEnoughCasesError, match="local studies folder"):
        trainer({}, None)  # type: ignore[arg-type]


def test_ends_when_its_server_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([100, 100, 1])
    monkeypatch.setattr(os, "getppid", for_this_thread(lambda: next(parents), os.getppid))
    monkeypatch.setattr(trainers, "lower_priority", lambda *_, **__: None)  # this is the tests' own process
    reported = []

    def work(studies: Path, settings: Any, report: Any, brake: Any) -> dict[str, Any]:
        for n in range(5):
            report(n, 5, loss=0.5, stage="ssl")
            reported.append(n)
        return {}

    with pytest.raises(SystemExit, match="continues"):
        Trainer(SETTINGS, Paths(SETTINGS, tmp_path), work, "")({}, None)  # type: ignore[arg-type]
    assert reported == [0]


def test_the_schedule_tells_the_round_its_night_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "lower_priority", lambda *_, **__: None)  # this is the tests' own process
    told: dict[str, Any] = {}

    def work(studies: Path, settings: Any, **more: Any) -> dict[str, Any]:
        told.update(more)
        return {}

    trainer = Trainer(SETTINGS, Paths(SETTINGS, tmp_path), work, "")
    trainer({"model": "round"}, None)  # type: ignore[arg-type]
    assert told["brake"].until is None
    assert "night" not in told
    trainer({"night": "2026-11-27T21:00:00+00:00", "until": "2026-11-28T05:00:00+00:00"}, None)  # type: ignore[arg-type]
    assert told["night"] == "2026-11-27T21:00:00+00:00"
    assert told["brake"].until == datetime(2026, 11, 28, 5, tzinfo=UTC)
