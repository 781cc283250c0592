"""The ledger: append-only, chained, safe between processes, and what it says is true now."""

from __future__ import annotations

import multiprocessing
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from aslseg.errors import FileWriteError, LedgerError
from aslseg.rounds.ledger import ledger as module
from aslseg.rounds.ledger import rows, schema
from aslseg.rounds.ledger.anchor import Head, read_head, write_head
from aslseg.rounds.ledger.ledger import Entry, Ledger, Score

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


def edit(ledger: Ledger, *statements: str) -> None:
    """As somebody with an SQLite program would."""
    with sqlite3.connect(ledger.path) as db:
        db.executescript("DROP TRIGGER IF EXISTS no_update; DROP TRIGGER IF EXISTS no_delete; " + "; ".join(statements))
    db.close()


def notes(ledger: Ledger, count: int) -> None:
    for n in range(count):
        ledger.append([Entry("note", details={"n": n})])


@pytest.mark.parametrize("cut", [1, 2, 4, 5])
def test_a_cut_tail_is_named_and_nothing_is_decided_on_it(ledger: Ledger, cut: int) -> None:
    notes(ledger, 5)
    ledger.require_whole()
    edit(ledger, f"DELETE FROM events WHERE seq > {5 - cut}")
    assert ledger.verify() == f"{cut} of 5 events are missing at its end"
    with pytest.raises(LedgerError, match=rf"{cut} of 5 events are missing.*backup.*--repair"):
        ledger.require_whole()
    # saving a label goes on, and hides nothing
    notes(ledger, 7)
    assert "event 5 is another one than was written" in str(ledger.verify())


def test_a_deleted_ledger_is_named_also_after_new_events(ledger: Ledger) -> None:
    notes(ledger, 3)
    for path in ledger.path.parent.glob("ledger.sqlite*"):
        path.unlink()
    assert "the file is gone; it had 3 events" in str(ledger.verify())
    notes(ledger, 1)
    assert ledger.verify() == "2 of 3 events are missing at its end"
    with pytest.raises(LedgerError, match="2 of 3"):
        ledger.require_whole()


def test_a_backup_without_the_latest_events_is_no_whole_ledger(ledger: Ledger) -> None:
    notes(ledger, 2)
    backup = ledger.path.read_bytes()
    notes(ledger, 3)
    for path in ledger.path.parent.glob("ledger.sqlite*"):
        path.unlink()
    ledger.path.write_bytes(backup)
    assert "3 of 5 events are missing" in str(ledger.verify())


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"events": "x", "sha256": "y"}'])
def test_a_missing_or_damaged_head_is_named_and_not_hidden_by_the_next_event(
    ledger: Ledger, content: str | None
) -> None:
    notes(ledger, 2)
    if content is None:
        ledger.anchor.unlink()
    else:
        ledger.anchor.write_text(content)
    notes(ledger, 1)
    assert "ledger.head.json" in str(ledger.verify())
    ledger.require_whole()  # no event is known to be missing


def test_a_head_that_is_behind_is_mended_by_the_next_event(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notes(ledger, 2)

    def full(*_: object) -> None:
        raise FileWriteError("no space")

    with monkeypatch.context() as filled:
        filled.setattr(module, "write_head", full)
        notes(ledger, 3)  # they are written; only their number is not
    assert "the next event writes it" in caplog.text
    assert (read_head(ledger.anchor), len(ledger.events())) == (Head(2, ledger.events()[1].hash), 5)
    assert ledger.verify() is None
    ledger.require_whole()
    notes(ledger, 1)
    assert read_head(ledger.anchor) == ledger.head() == Head(6, ledger.events()[-1].hash)


def test_a_head_of_another_ledger_is_noticed(ledger: Ledger) -> None:
    notes(ledger, 3)
    write_head(ledger.anchor, Head(2, "0" * 64))
    assert "event 2 is another one" in str(ledger.verify())


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE scores SET agreement = 0.99 WHERE case_id = 'a'",
        "DELETE FROM scores WHERE case_id = 'a'",
        "DELETE FROM scores",
        "INSERT INTO scores VALUES ('c', 1, 'now', 0.5, '{}')",
        "UPDATE scores SET details = '{\"promote\": true}'",
    ],
)
def test_edited_scores_are_noticed_and_written_again(ledger: Ledger, statement: str) -> None:
    scores = [Score("b", 1, 0.5, {"promote": False}), Score("a", 1, 1, {"promote": False})]
    ledger.set_scores(scores)
    ledger.set_scores(scores)  # a round that is resumed measures them again
    assert [e.kind for e in ledger.events()] == ["scored"]
    assert ledger.verify() is None
    edit(ledger, statement)
    assert "agreements were changed" in str(ledger.verify())
    ledger.set_scores(scores)
    assert ledger.verify() is None
    assert {s.case: s.agreement for s in ledger.scores()} == {"a": 1, "b": 0.5}


def test_a_ledger_of_version_0_1_gets_its_head_when_it_is_opened(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    notes(ledger, 2)
    edit(ledger, "PRAGMA user_version = 1")
    ledger.anchor.unlink()
    with caplog.at_level("INFO"):
        assert len(ledger.events()) == 2
        assert ledger.verify() is None
    assert caplog.text.count("is of version 0.1") == 1
    assert read_head(ledger.anchor) == ledger.head()
    ledger.anchor.unlink()
    assert "ledger.head.json" in str(ledger.verify())


def test_order_is_by_sequence_even_if_the_clock_goes_back(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append([mask("a", "1", 1)])
    monkeypatch.setattr(rows, "utc", lambda: "1999-01-01T00:00:00+00:00")
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
        worker.join(300)
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
    schema.write_ahead(impatient)
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

    modules = "aslseg.rounds.ledger.ledger, aslseg.models.published, aslseg.rounds.scheduling.progress, aslseg.cli"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_events_of_version_0_1_with_a_clock_still_verify(ledger: Ledger) -> None:
    ledger.append([Entry("note", details={"n": 1})])
    (first,) = ledger.events()
    old = rows.Event("note", details={"n": 2}, seq=2, time=first.time, previous=first.hash)
    with sqlite3.connect(ledger.path) as db:
        row = (2, old.time, 123456789, "note", None, None, None, '{"n": 2}', old.previous, old.digest(123456789))
        db.execute(rows.INSERT, row)
    ledger.append([Entry("note", details={"n": 3})])
    assert ledger.verify() is None
    assert [e.details["n"] for e in ledger.events()] == [1, 2, 3]
    assert old.digest() != old.digest(123456789)
