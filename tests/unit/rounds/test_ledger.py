"""The ledger: append-only, chained, safe between processes, and what it says is true now."""

from __future__ import annotations

import multiprocessing
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from aslseg.errors import LedgerError
from aslseg.rounds import ledger as module
from aslseg.rounds.ledger import Entry, Ledger, Score

MASK = {"agreement": {"liver": 0.9}, "threshold": {"liver": 0.5}, "models": {"ssl": "m"}, "image": "i"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "home" / "ledger.sqlite")


def mask(case: str, sha: str, number: int, tag: str = "aslseg_pseudo") -> Entry:
    return Entry("mask", number, case, tag, MASK | {"sha256": sha})


def test_empty_ledger_answers_without_making_a_file(ledger: Ledger) -> None:
    assert ledger.rounds() == []
    assert ledger.promotions() == []
    assert ledger.scores() == []
    assert ledger.validation_patients() == set()
    assert ledger.verify() is None
    assert not ledger.path.exists()


def test_rounds_are_numbered_continued_and_closed(ledger: Ledger) -> None:
    assert ledger.open_round({"a": 1}) == (1, False)
    ledger.append([Entry("failed", 1, details={"error": "no disk"})])
    assert ledger.rounds()[0].error == "no disk"
    assert ledger.open_round({}) == (1, True)
    ledger.close_round(1, {"source": "ssl"})
    assert ledger.open_round({}) == (2, False)
    first, second = ledger.rounds()
    assert (first.state, first.summary, second.state) == ("done", {"source": "ssl"}, "open")


def test_promotions_tell_what_became_of_them(ledger: Ledger) -> None:
    ledger.open_round({})
    ledger.append([mask("a", "1", 1), mask("b", "2", 1), mask("a", "x", 1, "original")])
    ledger.close_round(1, {})
    ledger.open_round({})
    ledger.append([mask("a", "3", 2), Entry("removed", 2, "b", "aslseg_pseudo", {"was": "2"})])
    assert [(p.case, p.sha256) for p in ledger.promotions()] == [("a", "3")]
    assert [p.status for p in ledger.promotions(active_only=False)] == ["demoted", "demoted", "active"]
    # a restored mask is the old promotion again, not a new one
    old = ledger.events(kinds=("mask",), tag="aslseg_pseudo", number=1)[0]
    restored = Entry("mask", 1, "a", "aslseg_pseudo", old.details | {"restored": old.seq})
    ledger.append([restored, Entry("rolled back", 2)])
    found = ledger.promotions(active_only=False)
    assert [(p.round, p.status) for p in found] == [(1, "active"), (1, "demoted"), (2, "rolled back")]
    assert ledger.masks("aslseg_pseudo")["a"].details["sha256"] == "1"
    assert ledger.masks("aslseg_pseudo", before=old.seq) == {}


def test_scores_are_replaced_and_come_lowest_first(ledger: Ledger) -> None:
    ledger.set_scores([Score("old", 1, 0.1, {})])
    ledger.set_scores([Score("b", 2, 0.5, {"flags": []}), Score("a", 2, 0.5, {}), Score("c", 2, 0.2, {})])
    assert [s.case for s in ledger.scores()] == ["c", "a", "b"]


@pytest.mark.parametrize("statement", ["UPDATE events SET kind = 'x'", "DELETE FROM events"])
def test_events_cannot_be_changed_or_deleted(ledger: Ledger, statement: str) -> None:
    ledger.open_round({})
    db = sqlite3.connect(ledger.path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute(statement)
    db.close()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ('UPDATE events SET details = \'{"patient": "q"}\' WHERE seq = 3', "event 3 "),
        ("UPDATE events SET time = '2020-01-01' WHERE seq = 2", "event 2 "),
        ("DELETE FROM events WHERE seq = 2", "event 2 is missing"),
    ],
)
def test_an_edited_file_is_noticed_at_its_first_bad_event(ledger: Ledger, statement: str, expected: str) -> None:
    for patient in "abcd":
        ledger.append([Entry("validation", details={"patient": patient})])
    assert ledger.verify() is None
    db = sqlite3.connect(ledger.path)
    db.executescript(f"DROP TRIGGER no_update; DROP TRIGGER no_delete; {statement}")
    db.close()
    assert expected in str(ledger.verify())


def test_order_is_by_sequence_even_if_the_clock_goes_back(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append([mask("a", "1", 1)])
    monkeypatch.setattr(module, "_utc", lambda: "1999-01-01T00:00:00+00:00")
    ledger.append([mask("a", "2", 2)])
    assert ledger.masks("aslseg_pseudo")["a"].details["sha256"] == "2"
    assert ledger.verify() is None


def append_many(path: Path, name: str, count: int) -> None:
    for n in range(count):
        Ledger(path).append([Entry("note", details={"by": name, "n": n})])


def test_two_processes_append_without_loss(ledger: Ledger) -> None:
    context = multiprocessing.get_context("spawn")
    sys.path.insert(0, str(Path(__file__).parent))
    workers = [context.Process(target=append_many, args=(ledger.path, name, 40)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    sys.path.pop(0)
    assert [w.exitcode for w in workers] == [0, 0]
    found = ledger.events(kinds=("note",))
    assert len(found) == 80
    assert [e.details["n"] for e in found if e.details["by"] == "a"] == list(range(40))
    assert ledger.verify() is None


def test_a_new_file_that_another_process_is_reading_is_waited_for(ledger: Ledger) -> None:
    ledger.path.parent.mkdir(parents=True, exist_ok=True)
    reader = sqlite3.connect(ledger.path, isolation_level=None, check_same_thread=False)
    reader.execute("CREATE TABLE other (x)")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM other").fetchall()
    impatient = sqlite3.connect(ledger.path, timeout=0, isolation_level=None)  # as two that switch at once are
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        impatient.execute("PRAGMA journal_mode = WAL")
    release = threading.Timer(0.2, lambda: reader.execute("COMMIT"))
    release.start()
    module._write_ahead(impatient)
    release.join()
    assert impatient.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    impatient.close()
    reader.close()


def test_a_ledger_in_use_for_too_long_says_so(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.open_round({})
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.1)
    with pytest.raises(LedgerError, match=r"in use by another process for 0.1 s; nothing was lost.*try again"):
        ledger.append([Entry("note", details={})])
    other.execute("COMMIT")
    other.close()
    ledger.append([Entry("note", details={})])
    assert len(ledger.events(kinds=("note",))) == 1


def test_a_damaged_or_newer_file_gives_a_clear_error(ledger: Ledger) -> None:
    ledger.open_round({})
    db = sqlite3.connect(ledger.path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match="newer ASLseg"):
        ledger.rounds()
    ledger.path.write_bytes(b"not a database " * 100)
    with pytest.raises(LedgerError, match="restore the file from a backup"):
        ledger.rounds()


def test_importing_the_ledger_imports_no_torch() -> None:
    import subprocess

    modules = "aslseg.rounds.ledger, aslseg.models.published, aslseg.rounds.progress, aslseg.cli"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_events_of_version_0_1_with_a_clock_still_verify(ledger: Ledger) -> None:
    ledger.append([Entry("note", details={"n": 1})])
    (first,) = ledger.events()
    old = module.Event("note", details={"n": 2}, seq=2, time=first.time, previous=first.hash)
    with sqlite3.connect(ledger.path) as db:
        row = (2, old.time, 123456789, "note", None, None, None, '{"n": 2}', old.previous, old.digest(123456789))
        db.execute(module.INSERT, row)
    ledger.append([Entry("note", details={"n": 3})])
    assert ledger.verify() is None
    assert [e.details["n"] for e in ledger.events()] == [1, 2, 3]
    assert old.digest() != old.digest(123456789)
