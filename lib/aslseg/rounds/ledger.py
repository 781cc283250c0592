"""The decisions of all rounds in one append-only, hash-chained SQLite table.

An event is never changed. The current state (which mask is promoted, which round is open, who validates) is the last
event about it, so that a rollback adds events and removes none. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from aslseg.errors import DiskFullError, LedgerError

VERSION = 1
BUSY_SECONDS = 60
"""How long to wait for another process's transaction."""
SCHEMA = (
    """CREATE TABLE events (
         seq INTEGER PRIMARY KEY, time TEXT NOT NULL, clock INTEGER NOT NULL, kind TEXT NOT NULL, round INTEGER,
         case_id TEXT, tag TEXT, details TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL)""",
    "CREATE INDEX events_kind ON events (kind, round)",
    "CREATE INDEX events_case ON events (tag, case_id, seq)",
    """CREATE TRIGGER no_update BEFORE UPDATE ON events
         BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER no_delete BEFORE DELETE ON events
         BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TABLE scores (
         case_id TEXT PRIMARY KEY, round INTEGER, time TEXT NOT NULL, agreement REAL NOT NULL,
         details TEXT NOT NULL)""",
)
COLUMNS = "seq, time, clock, kind, round, case_id, tag, details, previous, hash"
INSERT = f"INSERT INTO events ({COLUMNS}) VALUES ({', '.join('?' * 10)})"  # noqa: S608 - constants only
START = "0" * 64
NO_CLOCK = 0
"""Value of the column ``clock``, which only events of version 0.1 use; their hashes depend on it."""


@dataclass(frozen=True)
class Entry:
    """An event to be appended.

    Attributes:
        kind: ``opened``, ``failed``, ``closed``, ``rolled back`` (rounds); ``mask``, ``removed`` (label files);
            ``published``; ``validation``; ``note``.
        round, case, tag: What it is about, where that applies.
        details: JSON-serialisable.
    """

    kind: str
    round: int | None = None
    case: str | None = None
    tag: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event(Entry):
    """An appended event, with its place in the chain and its UTC time."""

    seq: int = 0
    time: str = ""
    previous: str = ""
    hash: str = ""

    def digest(self, clock: int = NO_CLOCK) -> str:
        """SHA-256 over everything else, the previous hash and the row's ``clock`` included."""
        content = [self.seq, self.time, clock, self.kind, self.round, self.case, self.tag, self.details]
        text = json.dumps([*content, self.previous], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RoundRow:
    """A round, as its events describe it."""

    number: int
    state: Literal["open", "done", "rolled back"]
    opened: str
    seq: int
    closed: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Promotion:
    """A promoted mask; ``status`` is ``active``, ``demoted`` or ``rolled back``."""

    case: str
    round: int
    time: str
    sha256: str
    agreement: dict[str, float | None]
    threshold: dict[str, float]
    models: dict[str, str]
    status: str


@dataclass(frozen=True)
class Score:
    """The current agreement of one scan; ``agreement`` is the mean over its labels."""

    case: str
    round: int | None
    agreement: float
    details: dict[str, Any]
    time: str = ""


class Ledger:
    """The ledger of one studies folder; safe to use from several threads and processes.

    Args:
        path: SQLite file on a local disk; made at the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    # rounds

    def open_round(self, details: dict[str, Any]) -> tuple[int, bool]:
        """Continue the open round, or open the next one.

        Returns:
            Its number, and whether it had been opened before.
        """
        rounds = self.rounds()
        for row in rounds:
            if row.state == "open":
                return row.number, True
        number = 1 + max((r.number for r in rounds), default=0)
        self.append([Entry("opened", number, details=details)])
        return number, False

    def close_round(self, number: int, summary: dict[str, Any]) -> None:
        """Record that a round is complete."""
        self.append([Entry("closed", number, details=summary)])

    def rounds(self) -> list[RoundRow]:
        """All rounds, oldest first."""
        rows: dict[int, RoundRow] = {}
        for e in self.events(kinds=("opened", "failed", "closed", "rolled back")):
            old = rows.get(e.round or 0)
            if e.kind == "opened":
                rows[e.round or 0] = RoundRow(e.round or 0, "open", e.time, e.seq)
            elif old and e.kind == "failed":
                rows[old.number] = RoundRow(old.number, old.state, old.opened, old.seq, error=e.details.get("error"))
            elif old and e.kind == "closed":
                rows[old.number] = RoundRow(old.number, "done", old.opened, old.seq, e.time, e.details)
            elif old:
                rows[old.number] = RoundRow(
                    old.number, "rolled back", old.opened, old.seq, old.closed, old.summary, old.error
                )
        return [rows[n] for n in sorted(rows)]

    # masks

    def masks(self, tag: str, before: int | None = None) -> dict[str, Event]:
        """The last event (``mask`` or ``removed``) about each label file of a tag.

        Args:
            tag: ``original`` or ``aslseg_pseudo``.
            before: Only events before this one are considered.
        """
        where = "tag = ? AND kind IN ('mask', 'removed') AND seq < ?"
        return {e.case or "": e for e in self._select(where, [tag, 2**62 if before is None else before])}

    def promotions(self, active_only: bool = True) -> list[Promotion]:
        """Promoted masks, oldest first."""
        undone = {r.number for r in self.rounds() if r.state == "rolled back"}
        now = self.masks("aslseg_pseudo")
        found = []
        for e in self.events(kinds=("mask",), tag="aslseg_pseudo"):
            if e.details.get("restored") is not None:
                continue
            current = now[e.case or ""]
            active = current.seq == e.seq or current.details.get("restored") == e.seq
            status = "active" if active else "rolled back" if e.round in undone else "demoted"
            if active or not active_only:
                kept: dict[str, Any] = {k: e.details[k] for k in ("sha256", "agreement", "threshold", "models")}
                found.append(Promotion(case=e.case or "", round=e.round or 0, time=e.time, status=status, **kept))
        return found

    # scores and validation

    def set_scores(self, scores: Iterable[Score]) -> None:
        """Replace the agreement of all scans by these."""
        now = _utc()
        with self._write() as db:
            db.execute("DELETE FROM scores")
            db.executemany(
                "INSERT INTO scores VALUES (?, ?, ?, ?, ?)",
                [(s.case, s.round, now, s.agreement, json.dumps(s.details, sort_keys=True)) for s in scores],
            )

    def scores(self) -> list[Score]:
        """Current agreements, lowest first (ties by id)."""
        with self._read() as db:
            query = "SELECT case_id, round, agreement, details, time FROM scores ORDER BY agreement, case_id"
            rows = db.execute(query).fetchall() if db else []
        return [Score(case, number, value, json.loads(details), at) for case, number, value, details, at in rows]

    def validation_patients(self) -> set[str]:
        """Patients that were ever chosen to validate models; they stay chosen."""
        return {e.details["patient"] for e in self.events(kinds=("validation",))}

    # the chain

    def append(self, entries: Iterable[Entry]) -> list[Event]:
        """Append events in one transaction, on disk when this returns.

        Raises:
            LedgerError: The file is damaged, of a newer version, or in use by another process for a minute.
        """
        events = []
        with self._write() as db:
            last = db.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
            seq, previous = last or (0, START)
            for e in entries:
                details = json.loads(json.dumps(e.details))
                event = Event(e.kind, e.round, e.case, e.tag, details, seq + 1, _utc(), previous)
                seq, previous = event.seq, event.digest()
                about = (seq, event.time, NO_CLOCK, e.kind, e.round, e.case, e.tag)
                db.execute(INSERT, (*about, json.dumps(details, sort_keys=True), event.previous, previous))
                events.append(replace(event, hash=previous))
        return events

    def events(self, kinds: tuple[str, ...] = (), tag: str | None = None, number: int | None = None) -> list[Event]:
        """Events in order, all or those of some kinds, a tag, a round."""
        where, values = ["1"], []
        if kinds:
            where.append(f"kind IN ({', '.join('?' * len(kinds))})")
            values += list(kinds)
        for column, value in (("tag", tag), ("round", number)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)  # type: ignore[arg-type]
        return list(self._select(" AND ".join(where), values))

    def verify(self) -> str | None:
        """Recompute the hash chain.

        Returns:
            None if it is intact, else the first event that breaks it.
        """
        expected, hash_before = 1, START
        for event, clock in self._rows("1", []):
            if event.seq != expected:
                return f"event {expected} is missing"
            if event.previous != hash_before or event.digest(clock) != event.hash:
                return f"event {event.seq} ({event.kind}, {event.time}) was changed after it was written"
            expected, hash_before = expected + 1, event.hash
        return None

    def _select(self, where: str, values: list[Any]) -> Iterator[Event]:
        return (event for event, _ in self._rows(where, values))

    def _rows(self, where: str, values: list[Any]) -> Iterator[tuple[Event, int]]:
        """Events with their column ``clock``."""
        with self._read() as db:
            query = f"SELECT {COLUMNS} FROM events WHERE {where} ORDER BY seq"  # noqa: S608 - our own clauses
            for row in db.execute(query, values) if db else ():
                seq, at, clock, kind, number, case, tag, details, previous, digest = row
                yield Event(kind, number, case, tag, json.loads(details), seq, at, previous, digest), clock

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection | None]:
        if not self.path.exists():
            yield None
            return
        with self._connected() as db:
            yield db

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connected() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection for one call, so that threads share nothing."""
        try:
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                _write_ahead(db)
                db.execute("PRAGMA synchronous = FULL")
                self._prepare(db)
                yield db
            finally:
                db.close()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise DiskFullError(f"disk full while writing {self.path}; free some space and run again") from error
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise LedgerError(
                    f"{self.path} was in use by another process for {BUSY_SECONDS} s; nothing was lost or written. "
                    "Let it finish, or stop it, and try again"
                ) from error
            raise LedgerError(
                f"{self.path}: {error}; restore the file from a backup, or move it away to start an empty ledger "
                "(labels stay as they are)"
            ) from error

    def _prepare(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise LedgerError(f"{self.path} was written by a newer ASLseg (format {version}); update ASLseg")
        if version == 0:
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            db.execute("COMMIT")


def _write_ahead(db: sqlite3.Connection) -> None:
    """Turn the write-ahead log on; of two processes that do so at once, SQLite refuses one without waiting."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
