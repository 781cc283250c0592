"""What several folders of unit tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aslseg import cli
from aslseg.ssl import engine
from tiny_rounds import SHAPE

Run = Callable[..., tuple[int, str, str]]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``aslseg`` in this process: exit code, stdout, stderr."""
    for key in [k for k in os.environ if k.startswith(("ASLSEG_", "OMP_"))]:
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aslseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture
def short_nights(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/bench_nights.py on the smallest phantoms."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_nights

    monkeypatch.setattr(bench_nights, "HELD_OUT", 2)
    monkeypatch.setattr(bench_nights, "SHAPE", SHAPE)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    monkeypatch.setattr(engine, "CLASS_BATCHES", 1)
    return bench_nights
