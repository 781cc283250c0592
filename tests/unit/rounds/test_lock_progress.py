"""One round at a time, and how far it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aslseg.errors import RoundRunningError
from aslseg.rounds import progress as module
from aslseg.rounds.lock import owner, round_lock
from aslseg.rounds.progress import Progress, read_progress


def test_a_second_round_is_refused_with_who_and_since_when(tmp_path: Path) -> None:
    refused = pytest.raises(RoundRunningError, match=rf"process {os.getpid()} on .* since 20")
    with round_lock(tmp_path), refused, round_lock(tmp_path):
        pass
    with round_lock(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert owner(tmp_path) == {}


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from aslseg.rounds.lock import round_lock\n"
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


def test_eta_scales_expectations_by_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told: list[dict] = []
    progress = Progress(
        tmp_path / "p.json", {"a": 10, "b": 20, "c": 30}, lambda d, t, **k: told.append({"d": d, "t": t, **k})
    )
    with progress.stage("a") as report:
        now[0] += 20
        report(10, 10, loss=0.5)
    # a took twice what was expected: so will b and c
    assert told[-1]["eta"] == pytest.approx(100)
    assert told[-1]["loss"] == 0.5
    with progress.stage("b"):
        now[0] += 0.1
    # b was reused: it tells nothing about speed
    with progress.stage("c") as report:
        now[0] += 30
        report(15, 30)
    assert told[-1]["eta"] == pytest.approx(30)
    assert progress.measured == {"a": 20, "c": 30}
    progress.finish()
    assert read_progress(tmp_path / "p.json")["state"] == "done"


def test_progress_file_is_throttled_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(module, "write_json", lambda path, content: written.append(content))
    progress = Progress(tmp_path / "p.json", {"a": 1, "b": 1}, round_number=7)
    with progress.stage("b") as report:
        for n in range(1000):
            report(n, 1000, loss=1.0)
    assert len(written) == 1
    assert written[0] | {"stage": "b", "stage_index": 2, "stages": 2, "round": 7, "pid": os.getpid()} == written[0]
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
