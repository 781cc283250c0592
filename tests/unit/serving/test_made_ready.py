"""What the first request after a start or a round would wait for is made before it comes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from aslseg.review import ledger_lists, page
from aslseg.rounds.ledger import Entry, Ledger
from aslseg.serving import made_ready
from aslseg.settings import Paths, load_settings


def test_one_call_now_the_other_again_and_again_whatever_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(made_ready, "LOOK_SECONDS", 0.01)
    seen, enough = [], threading.Event()

    def often() -> None:
        seen.append("often")
        if seen.count("often") == 3:
            enough.set()
            raise SystemExit  # the thread ends here
        raise OSError("a disk that is away")

    made_ready.keep_ready(lambda: seen.append("once"), often)
    assert enough.wait(60)
    assert seen[:4] == ["often", "once", "often", "often"]
    assert "nothing was made ready: a disk that is away" in caplog.text


def test_after_a_round_the_next_page_reads_no_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = load_settings({"model_dir": str(tmp_path / "model")}, env={})
    (tmp_path / "studies").mkdir()
    paths = Paths(settings, tmp_path / "studies")
    page.prepare(settings, paths)
    ledger = Ledger(paths.ledger)
    ledger.append([Entry("opened", 1)])
    ledger.close_round(1, {"decisions": {}, "warnings": ["no validation cases"]})
    page.prepare(settings, paths)
    monkeypatch.setattr(ledger_lists, "decisions_of", lambda *_: pytest.fail("decisions are read while somebody waits"))
    assert ledger_lists.decisions(ledger).warnings == ("no validation cases",)
