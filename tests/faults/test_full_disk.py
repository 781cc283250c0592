"""No room: a clear message, nothing half written, and the round goes on when there is room again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from collections import namedtuple
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from aslseg.agreement.promotion_rules import Verdict
from aslseg.errors import DiskFullError, LedgerError
from aslseg.review.report import write
from aslseg.rounds.ledger import ledger as ledger_module
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.promotion import canaries, promotion
from aslseg.rounds.run import run_round
from aslseg.settings import Paths
from aslseg.ssl import engine
from tiny_rounds import label_hashes, published_hashes, tiny_settings, tiny_studies

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)


def test_a_round_does_not_start_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies, settings = tiny_studies(tmp_path, cases=2, labelled=1), tiny_settings(tmp_path, min_free_gb=1.0)
    before = label_hashes(studies)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 10**8))
    with pytest.raises(DiskFullError, match=r"0\.10 GB free, at least 1\.00 GB needed"):
        run_round(studies, settings)
    assert label_hashes(studies) == before
    assert Ledger(Paths(settings, studies).ledger).rounds() == []


def test_a_disk_that_fills_up_stops_the_round_and_room_lets_it_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings = tiny_studies(tmp_path, cases=3, labelled=2), tiny_settings(tmp_path)
    paths, replace, written = Paths(settings, studies), os.replace, [0]

    def full(source: Any, target: Any) -> None:
        written[0] += Path(target).is_relative_to(tmp_path)
        if written[0] > 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as filled:
        filled.setattr(os, "replace", full)
        with pytest.raises(DiskFullError, match="free some space and run again"):
            run_round(studies, settings)
    assert published_hashes(settings, studies) == {}
    (row,) = Ledger(paths.ledger).rounds()
    assert row.state == "open"
    assert "disk full" in str(row.error)
    summary = run_round(studies, settings)
    assert (summary["round"], summary["continued"]) == (1, True)
    assert set(published_hashes(settings, studies)) == {"ssl", "sam", "adapter"}


STEPS = [
    "*/cache/*.npy",
    "*/steps/ssl-*.safetensors",
    "*/steps/predict-*.npz",
    "*/steps/sam-*.safetensors",
    "*/steps/redraw-*.npz",
    "*/steps/adapter-*.safetensors",
    "*/steps/refine-*.npz",
    "*/.aslseg/masks/*",
    "*/labels/aslseg_pseudo/*",
    "*/steps/promoted-*.npy",
    "*/steps/ssl-*.safetensors",
    "*/models/ssl-*",
    "*/models/manifest.json",
    "*/labels/original/*",
    "*/.aslseg/original/*.json",
    "*/rounds/used.json",
    "*/reports/round-1.json",
]
"""What a round writes, in its order."""


def test_a_disk_that_is_full_at_each_step_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run goes on where the one before it stopped, and the last one ends like a round that had room."""
    monkeypatch.setattr(promotion, "judge", lambda *_: Verdict(True))
    monkeypatch.setattr(canaries, "FLOOR", 0.0)
    results = []
    for name, steps in (("room", []), ("full", STEPS)):
        root = tmp_path / name
        root.mkdir()
        studies = tiny_studies(root, cases=3, labelled=2)
        settings = tiny_settings(root, promote_fraction=1, promote_empty=1)
        for step in steps:
            with monkeypatch.context() as filled:
                filled.setattr(os, "replace", refusing(root, step))
                with pytest.raises(DiskFullError, match="free some space and run again"):
                    run_round(studies, settings)
            (row,) = Ledger(Paths(settings, studies).ledger).rounds()
            assert row.state == "open", step
            assert "disk full" in str(row.error), step
        summary = run_round(studies, settings)
        assert (summary["round"], summary["continued"]) == (1, bool(steps))
        results.append((label_hashes(studies), published_hashes(settings, studies), summary["decisions"]))
    assert results[0] == results[1]


def refusing(root: Path, step: str) -> Any:
    """``os.replace`` on a disk without room for the first file in a folder that matches."""
    replace, refused = os.replace, []

    def full(source: Any, target: Any) -> None:
        if not refused and fnmatch(str(target), f"{root}{step}"):
            refused.append(target)
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    return full


def test_a_report_that_cannot_be_written_or_sent_leaves_the_round_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    studies = tiny_studies(tmp_path, cases=2, labelled=1)
    settings = tiny_settings(tmp_path, report_webhook="http://127.0.0.1:9/secret")
    paths, replace = Paths(settings, studies), os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".html"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with monkeypatch.context() as filled:
        filled.setattr(os, "replace", full)
        run_round(studies, settings)
    (row,) = Ledger(paths.ledger).rounds()
    assert row.state == "done"
    assert "secret" not in json.dumps([e.details for e in Ledger(paths.ledger).events()])
    page, sent = [r.getMessage() for r in caplog.records if "report" in r.getMessage()]
    assert page.startswith("the page of round 1 could not be made (disk full while writing")
    assert sent.startswith("report_webhook: 127.0.0.1 did not take the headline")
    assert list(paths.reports.glob("*.html")) == []
    path, _ = write(paths, settings)
    assert path.is_file()


def test_a_full_ledger_says_so_and_keeps_its_chain(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([Entry("note", details={"n": 0})])
    pages = os.path.getsize(ledger.path) // 4096
    connected = ledger._connected

    def limited() -> Any:
        from contextlib import contextmanager

        @contextmanager
        def inner() -> Any:
            with connected() as db:
                db.execute(f"PRAGMA max_page_count = {pages + 1}")
                yield db

        return inner()

    ledger._connected = limited  # type: ignore[method-assign]
    with pytest.raises(DiskFullError, match="disk full while writing"):
        ledger.append([Entry("note", details={"text": "x" * 100_000})])
    del ledger._connected
    assert ledger.verify() is None
    ledger.append([Entry("note", details={"n": 1})])
    assert len(ledger.events()) == 2


def test_a_ledger_without_room_for_its_log_says_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([Entry("note")])
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE

    def refuse(_: Any) -> None:
        raise error

    monkeypatch.setattr(ledger_module, "write_ahead", refuse)
    with pytest.raises(LedgerError, match="disk I/O error; check the disk"):
        ledger.append([Entry("note")])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 1000))
    with pytest.raises(DiskFullError, match=r"disk full while writing .*ledger\.sqlite; free some space"):
        ledger.append([Entry("note")])
