"""What the first request after a start or a round would wait for is made before it comes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from aslseg.errors import LedgerError
from aslseg.review import ledger_lists, page
from aslseg.rounds.ledger.ledger import Entry, Ledger
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


def test_an_error_that_stays_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(made_ready, "LOOK_SECONDS", 0.01)
    errors, ended = ["away"] * 4 + ["", "away", "full", "full"], threading.Event()

    def often() -> None:
        if not errors:
            ended.set()
            raise SystemExit
        error = errors.pop(0)
        if error:
            raise OSError(error)

    made_ready.keep_ready(often, often)
    assert ended.wait(60)
    assert [r.message.rsplit(" ", 1)[1] for r in caplog.records if "made ready" in r.message] == [
        "away",
        "away",
        "full",
    ]


def test_while_one_waits_for_the_ledger_the_others_get_what_was_read_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_lists, "WAIT_SECONDS", 0.05)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.append([Entry("opened", 1)])
    kept, reads, released = ledger_lists.KeptParts(ledger.path), threading.Event(), threading.Event()

    def waits() -> bool:
        reads.set()
        assert released.wait(60)
        return False

    def reader() -> threading.Thread:
        thread = threading.Thread(target=kept.now)
        reads.clear()
        released.clear()
        monkeypatch.setattr(kept, "_look", lambda: waits() or ledger_lists.KeptParts._look(kept))
        thread.start()
        assert reads.wait(60)
        return thread

    first = reader()
    with pytest.raises(LedgerError, match="in use"):
        kept.now()
    released.set()
    first.join(60)
    ledger.append([Entry("closed", 1, details={"warnings": ["new"]})])
    second = reader()
    assert len(kept.now().rounds) == 1
    assert kept.now().warnings == ()
    released.set()
    second.join(60)
    monkeypatch.undo()
    assert kept.now().warnings == ("new",)


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
