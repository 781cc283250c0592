"""Niceness cannot be taken back, so everything here happens in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no priority here")

BEFORE = """
import json, os, threading
from pathlib import Path
from aslseg.serving.priority import AHEAD, ROUND, lower_priority
os.setpriority(os.PRIO_PROCESS, 0, START)
own, ready, end = threading.get_native_id(), threading.Event(), threading.Event()
other = threading.Thread(target=lambda: (ready.set(), end.wait()), daemon=True)
other.start()
ready.wait()
def niceness():
    return {t: os.getpriority(os.PRIO_PROCESS, t) for t in (own, other.native_id)}
"""
AFTER = """
print(json.dumps(list(niceness().values())))
end.set()
"""
TRAINER = """
from aslseg.serving.trainers import Trainer
from aslseg.settings import Paths, load_settings
settings, _ = load_settings({}, env={})
def work(studies, settings, report, **_):
    import subprocess, sys
    child = [sys.executable, "-c", "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"]
    print(json.dumps([*niceness().values(), int(subprocess.run(child, capture_output=True, check=True).stdout)]))
    end.set()
    return {}
Trainer(settings, Paths(settings, Path(".")), work, "")({}, None)
"""


HERE = os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else 0  # of the tests themselves


def run(code: str, start: int = HERE) -> list[int]:
    script = BEFORE.replace("START", str(start)) + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_a_thread_steps_back_alone() -> None:
    assert run("lower_priority(AHEAD)" + AFTER) == [19, HERE]


def test_a_process_steps_back_with_all_its_threads() -> None:
    assert run("lower_priority(ROUND, whole=True)" + AFTER) == [max(10, HERE)] * 2


def test_nobody_becomes_more_urgent() -> None:
    start = max(15, HERE)
    assert run("lower_priority(ROUND, whole=True)" + AFTER, start) == [start] * 2


def test_a_round_has_what_annotators_leave() -> None:
    assert run(TRAINER) == [max(10, HERE)] * 3
