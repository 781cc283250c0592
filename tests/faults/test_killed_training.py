"""A training that is killed with SIGKILL at any point goes on and ends with the same bytes as one left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from training_killer import EVERY, run

# (point, which time, step that the next run must go on from)
KILLS = [
    ("step", 1, 0),
    ("half", 1, 0),
    ("before", 1, 0),
    ("after", 1, EVERY),
    ("half", 1, EVERY),
    ("before", 2, 2 * EVERY),
    ("step", 4, 3 * EVERY),
]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch):
    """Starts a training; a fork of a server that has imported everything."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_killer"])

    def start(out: Path, point: str = "never", number: int = 0) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run, args=(out, point, number))
        process.start()
        return process

    return start


def step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["step"]) if checkpoint.exists() else 0


@pytest.mark.slow
def test_killed_at_every_kind_of_point(child, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "m.safetensors"
    first = child(whole)
    first.join(300)
    assert first.exitcode == 0

    out = tmp_path / "killed" / "m.safetensors"
    checkpoint = out.with_name("m.checkpoint.pt")
    for point, number, expected in KILLS:
        process = child(out, point, number)
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, point
        # whatever is there under its name can be read, and is where it should be
        assert step_of(checkpoint) == expected, (point, number)
        assert not out.exists()

    # and at a moment of its own choosing
    process = child(out)
    before, wait = step_of(checkpoint), random.Random(0).uniform(0.05, 0.5)
    end = time.monotonic() + 300
    while step_of(checkpoint) == before and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    process.join(60)

    last = child(out)
    last.join(300)
    assert last.exitcode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not checkpoint.exists()
