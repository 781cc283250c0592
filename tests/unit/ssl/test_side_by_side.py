"""Trainings in processes of their own: same models, steps of all, one that diverges, one that dies, an early end."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aslseg.cases.prepared_case import Prepared, arrays, backing_file
from aslseg.errors import BadWeightsError, NoResourcesError, OutOfTimeError, TrainingDivergedError
from aslseg.settings import Settings
from aslseg.ssl import distributed, side_by_side
from aslseg.ssl.side_by_side import Steps, Training, places, train_all
from aslseg.types import no_progress

STEPS = 6


@pytest.fixture
def make(make_case, tiny_settings, tmp_path):
    """A training of six steps, on cases whose arrays lie in files as those of a round do."""

    def stored(case: Prepared) -> Prepared:
        files = {name: tmp_path / f"{case.id}.{name}.npy" for name in arrays(case)}
        for name, file in files.items():
            np.save(file, getattr(case, name))
        return replace(case, **{name: np.load(file, mmap_mode="r") for name, file in files.items()})

    def one(name: str, seed: int = 0, **changes: Any) -> Training:
        given = {"network": "unet", "batch_labelled": 1, "batch_unlabelled": 1} | changes
        labelled = [stored(make_case(seed)), make_case(seed + 10)]
        out = tmp_path / name / "ssl.safetensors"
        out.parent.mkdir(exist_ok=True)
        return Training(labelled, [make_case(5, labelled=False)], tiny_settings(**given), out, STEPS, None)

    return one


def test_they_give_the_models_of_one_after_the_other(
    make, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    # what lies in the current folder, which may be a shared one with scans, is not executed
    (tmp_path / "random.py").write_text("raise SystemExit('another random')")
    monkeypatch.chdir(tmp_path)
    alone = [one["sha256"] for one in train_all([make("a"), make("b", 1)], 1, no_progress)]
    seen: list[tuple[int, int]] = []
    both = [make("a2"), make("wild", 2, learning_rate=1e30), make("b2", 1)]
    first, wild, last = train_all(both, 2, lambda done, total, **shown: seen.append((done, total)))
    assert [first["sha256"], last["sha256"]] == alone
    assert isinstance(wild, TrainingDivergedError)
    done, total = seen[-1]
    assert 2 * STEPS <= done == total < 3 * STEPS, "what is not done after a divergence does not count"
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    # their log is that of this process
    assert sum("unet" in record.getMessage() for record in caplog.records) >= 5


def test_steps_that_a_checkpoint_had_done_do_not_count() -> None:
    """Also where the training has paused before its first step, and where its second stage goes on too."""
    seen: list[tuple[int, int]] = []
    steps = Steps([100, 10], lambda done, total: seen.append((done, total)))
    for step in (0, 0, 61, 62, 91, 92):
        steps(0, step, {})
    steps(1, 1, {})
    assert seen == [(0, 110), (0, 110), (1, 50), (2, 50), (3, 22), (4, 22), (5, 22)]


def test_what_ends_the_work_ends_all_of_them_and_they_go_on_from_there(make, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = train_all([make("whole")], 1, no_progress)
    counted: list[Steps] = []

    class Counted(Steps):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            counted.append(self)

    def stop(done: int, total: int, **shown: Any) -> None:
        if done >= 4:
            raise OutOfTimeError("the night is over")

    monkeypatch.setattr(side_by_side, "Steps", Counted)
    trainings = [make("a"), make("b", 1)]
    with pytest.raises(OutOfTimeError, match="the night is over"):
        train_all(trainings, 2, stop)
    # on a busy machine one may not have begun, or may have been in its first step, which it ends and keeps
    kept = [t.out.with_name("ssl.checkpoint.pt").exists() for t in trainings]
    assert all(there for there, done in zip(kept, counted[0].done, strict=True) if done)
    assert any(kept)
    assert not any(t.out.exists() for t in trainings)
    found = train_all(trainings, 2, no_progress)
    assert found[0]["sha256"] == whole["sha256"]
    assert [one["steps"] < STEPS for one in found] == kept


def test_one_that_is_killed_says_what_to_do_and_ends_the_others(make, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[side_by_side.Process] = []
    begin = side_by_side.Process.__init__

    def watched(self: side_by_side.Process, *given: Any) -> None:
        begin(self, *given)
        started.append(self)

    monkeypatch.setattr(side_by_side.Process, "__init__", watched)

    def kill(done: int, total: int, **shown: Any) -> None:
        started[0]._process.kill()

    with pytest.raises(NoResourcesError, match=r"exit code -9.*folds_at_once 1"):
        train_all([make("a"), make("b", 1)], 2, kill)
    assert all(process._process.poll() is not None for process in started)


def test_what_else_goes_wrong_there_is_raised_here(make, tmp_path: Path) -> None:
    trainings = [make("a"), make("b")]
    broken = [replace(t, init=tmp_path / "missing.safetensors") for t in trainings]
    with pytest.raises(BadWeightsError, match=r"missing\.safetensors does not exist"):
        train_all(broken, 2, no_progress)


def test_a_file_that_is_gone_is_named(make) -> None:
    trainings = [make("a"), make("b", 1)]
    missing = backing_file(trainings[0].labelled[0].image)
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=missing.name):
        train_all(trainings, 2, no_progress)


def test_the_time_of_a_step_is_not_that_of_steps_that_a_checkpoint_had_done() -> None:
    seen: list[tuple[int, int]] = []
    steps = Steps([100, 100, 100], lambda done, total, **_: seen.append((done, total)))
    steps(0, 61, {})
    steps(1, 1, {})
    steps(1, 2, {})
    steps.finish(1)  # it diverged
    steps(2, 91, {})
    steps(0, 62, {})
    assert seen == [(1, 240), (2, 240), (3, 240), (4, 52), (5, 52)]


def test_a_process_is_not_bound_to_a_core_and_a_missing_one_is_said(make, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def full(command: list[str], **how: Any) -> None:
        given.update(how["env"])
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(side_by_side.subprocess, "Popen", full)
    with pytest.raises(NoResourcesError, match="temporarily unavailable"):
        train_all([make("a"), make("b", 1)], 2, no_progress)
    assert "OMP_PROC_BIND" not in given
    assert given["OMP_NUM_THREADS"] == "1"


def test_lines_below_the_level_of_the_log_are_left_out(make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train_all([make("a"), make("b", 1)], 2, no_progress)
    assert [r for r in caplog.records if r.levelno < logging.WARNING] == []


def test_arrays_in_files_are_sent_as_these_files(make) -> None:
    training = make("a")
    packed = training.packed()
    assert isinstance(packed.labelled[0].image, Path)
    assert isinstance(packed.labelled[1].image, np.ndarray)
    again = packed.unpacked()
    assert backing_file(again.labelled[0].image) == backing_file(training.labelled[0].image)
    np.testing.assert_array_equal(again.labelled[0].label, training.labelled[0].label)
    # a training of files is one of their arrays, in this process too
    trained = [one["sha256"] for one in train_all([training, replace(packed, out=make("b").out)], 1, no_progress)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("conf", "threads", "free_gb", "count", "expected"),
    [
        ({}, 8, 100, 4, 4),
        ({}, 2, 100, 4, 2),
        ({"threads": 1}, 8, 100, 4, 1),
        ({"training_memory_gb": 4}, 8, 11, 4, 2),
        ({}, 8, 1, 4, 1),
        ({"folds_at_once": 3}, 1, 1, 4, 3),
        ({"folds_at_once": 3}, 8, 100, 2, 2),
    ],
)
def test_as_many_as_threads_and_memory_allow(
    conf: dict[str, Any], threads: int, free_gb: float, count: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(side_by_side, "free_memory", lambda: free_gb * 1e9)
    assert places(Settings(device="cpu", **conf), count) == expected


def test_one_where_processes_share_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert places(Settings(folds_at_once=4), 4) == 1
