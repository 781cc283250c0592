"""One round at a time, and how far it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from aslseg.errors import OutOfTimeError, RoundRunningError
from aslseg.rounds.scheduling import progress as module
from aslseg.rounds.scheduling.lock import owner, round_lock
from aslseg.rounds.scheduling.progress import Progress, Work, read_progress


def test_a_second_round_is_refused_with_who_and_since_when(tmp_path: Path) -> None:
    refused = pytest.raises(RoundRunningError, match=rf"process {os.getpid()} on .* since 20")
    with round_lock(tmp_path), refused, round_lock(tmp_path):
        pass
    with round_lock(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert owner(tmp_path) == {}


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from aslseg.rounds.scheduling.lock import round_lock\n"
        "with round_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(RoundRunningError, match=f"process {child.pid}"), round_lock(tmp_path):
        pass
    child.kill()
    child.wait()
    with round_lock(tmp_path):
        pass


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, which stands still until a test moves it."""
    moment = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    return moment


def test_eta_scales_expectations_by_what_was_measured(tmp_path: Path, now: list[float]) -> None:
    told: list[dict] = []
    work = {"a": Work(10, 1.0), "b": Work(10, 2.0), "c": Work(30, 1.0)}
    progress = Progress(tmp_path / "p.json", work, lambda d, t, **k: told.append({"d": d, "t": t, **k}))
    with progress.stage("a") as report:
        for step in range(1, 11):
            now[0] += 2
            report(step, 10, loss=0.5)
    # a took twice what was expected: so will b and c
    assert told[-1]["eta"] == pytest.approx(100)
    assert told[-1]["loss"] == 0.5
    with progress.stage("b"):
        now[0] += 0.1
    # b was reused: it tells nothing about speed
    with progress.stage("c") as report:
        for step in range(1, 16):
            now[0] += 2
            report(step, 30)
    assert told[-1]["eta"] == pytest.approx(30)
    assert progress.measured == {"a": 20, "c": 30}
    assert progress.rates == {"a": 2, "c": 2}
    progress.finish()
    assert read_progress(tmp_path / "p.json")["state"] == "done"


def test_what_was_found_done_says_nothing_about_speed(tmp_path: Path, now: list[float]) -> None:
    """A training that goes on from its checkpoint, and predictions of which most are on disk: the old estimate said
    0:02, and then took a quarter of an hour."""
    told: list[float] = []
    work = {"ssl": Work(2000, 0.3), "predict": Work(50, 2.0), "retrain": Work(1500, 0.3)}
    progress = Progress(tmp_path / "p.json", work, lambda d, t, eta, **_: told.append(eta))
    with progress.stage("ssl") as report:
        report(0, 2000)  # scans are read, between which it may pause
        now[0] += 5  # reading the checkpoint
        for step in range(1901, 2001):
            now[0] += 0.3
            report(step, 2000)
            assert told[-1] == pytest.approx((2000 - step) * 0.3 + 100 + 450)
    with progress.stage("predict") as report:
        for case in (1, 2):
            now[0] += 2
            report(case, 2)
    assert told[-1] == pytest.approx(450)
    assert progress.rates == {"ssl": 0.3, "predict": 2.0}, "later rounds expect the whole work at this pace"


def test_what_comes_before_the_first_step_is_no_pace(tmp_path: Path, now: list[float]) -> None:
    """The adaptation network first lets SAM draw for a minute: its steps do not take twenty seconds each."""
    told: list[float] = []
    work = {"adapter": Work(600, 0.1), "refine": Work(10, 1.0)}
    progress = Progress(tmp_path / "p.json", work, lambda d, t, eta, **_: told.append(eta))
    with progress.stage("adapter") as report:
        for _ in range(60):
            now[0] += 1
            report(0, 600)
        for step in range(1, 601):
            now[0] += 0.1
            report(step, 600)
            assert told[-1] == pytest.approx((600 - step) * 0.1 + 10)
    assert progress.rates == {"adapter": 0.2}, "later rounds expect that minute too"


def test_stages_that_are_expected_on_disk_take_no_time_until_one_is_not_there(tmp_path: Path, now: list[float]) -> None:
    told: list[float] = []
    work = {"ssl": Work(100, 1.0), "sam": Work(100, 1.0), "redraw": Work(10, 1.0)}
    progress = Progress(tmp_path / "p.json", work, lambda d, t, eta, **_: told.append(eta), found=("ssl", "sam"))
    with progress.stage("ssl"):
        assert told[-1] == 10
    progress.seconds.clear()
    with progress.stage("ssl") as report:
        now[0] += 1
        report(1, 100)
    # a label was changed: nothing of the other run fits
    assert told[-1] == pytest.approx(99 + 100 + 10)


def test_pauses_are_no_work(tmp_path: Path, now: list[float]) -> None:
    def brake(stage: str, begins: bool = False) -> float:
        now[0] += 0 if begins else 60
        return 0 if begins else 60

    progress = Progress(tmp_path / "p.json", {"a": Work(4, 1.0)}, brake=brake)
    with progress.stage("a") as report:
        for step in range(1, 5):
            now[0] += 1
            report(step, 4)
    assert progress.rates == {"a": 1}
    assert progress.seconds == {"a": 4}


def test_a_round_of_two_nights_took_the_time_of_both(tmp_path: Path, now: list[float]) -> None:
    path, work = tmp_path / "p.json", {"a": Work(4, 1.0), "b": Work(8, 1.0)}
    first = Progress(path, work)
    with first.stage("a") as report:
        now[0] += 4
        report(4, 4)
    with suppress(OutOfTimeError), first.stage("b") as report:
        now[0] += 3
        report(3, 8)
        raise OutOfTimeError("the window closes")
    first.pause("the window closes")
    second = Progress(path, work, before=read_progress(path))
    with second.stage("a"):
        pass  # found on disk
    with second.stage("b") as report:
        now[0] += 5
        report(8, 8)
    assert second.seconds == {"a": 0, "b": 5}
    assert second.spent == second.measured == {"a": 4, "b": 8}


def test_progress_file_is_throttled_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(module, "write_json", lambda path, content: written.append(content))
    progress = Progress(tmp_path / "p.json", {"a": Work(1, 1), "b": Work(1, 1)}, round_number=7)
    with progress.stage("b") as report:
        for n in range(1000):
            report(n, 1000, loss=1.0)
    assert len(written) == 1
    assert written[0] | {"stage": "b", "stage_index": 2, "stages": 2, "round": 7, "pid": os.getpid()} == written[0]
    started = datetime.fromisoformat(written[0]["updated"])
    assert datetime.fromisoformat(written[0]["finish"]) - started >= timedelta(seconds=written[0]["eta"] - 1)
    progress.pause("the night is over")
    assert written[-1] | {"state": "paused", "message": "the night is over", "part": 0.4995} == written[-1]
    progress.fail("disk full")
    assert written[-1] | {"state": "failed", "error": "disk full"} == written[-1]


def test_a_vanished_process_counts_as_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    assert read_progress(path) == {"state": "none"}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path.write_text(json.dumps({"state": "running", "pid": gone.pid}))
    assert read_progress(path)["state"] == "interrupted"
    path.write_text(json.dumps({"state": "running", "pid": os.getpid()}))
    assert read_progress(path)["state"] == "running"
    path.write_text("{half")
    assert read_progress(path)["state"] == "none"
