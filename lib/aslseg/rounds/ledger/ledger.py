"""The decisions of all rounds in one append-only, hash-chained SQLite table.

An event is never changed. The current state (which mask is promoted, which round is open, who validates) is the last
event about it, so that a rollback adds events and removes none. The head of the chain is kept in a file of its own
(:mod:`aslseg.rounds.ledger.anchor`). What a round promoted and why is read with
:mod:`aslseg.rounds.promotion.decisions`, and shown by ``aslseg ledger list`` and ``aslseg report``. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from aslseg.errors import DiskFullError, LedgerError
from aslseg.files import nearly_full
from aslseg.rounds.ledger.anchor import Head, anchor_path, read_head, write_head
from aslseg.rounds.ledger.events import Entry, Event, Promotion, RoundRow, Score, scores_hash
from aslseg.rounds.ledger.rows import contradiction_of, events_of, head_of, insert, scores_of, utc
from aslseg.rounds.ledger.schema import BUSY_SECONDS, SCHEMA, START, VERSION, write_ahead

logger = logging.getLogger(__name__)

__all__ = ["Entry", "Event", "Ledger", "Promotion", "RoundRow", "Score"]


class Ledger:
    """The ledger of one studies folder; safe to use from several threads and processes.

    Args:
        path: SQLite file on a local disk; made at the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.anchor = anchor_path(self.path)

    # rounds

    def open_round(self, details: dict[str, Any]) -> tuple[int, bool]:
        """Continue the open round, or open the next one.

        Returns:
            Its number, and whether it had been opened before.
        """
        rounds = self.rounds(summaries=False)
        for row in rounds:
            if row.state == "open":
                return row.number, True
        number = 1 + max((r.number for r in rounds), default=0)
        self.append([Entry("opened", number, details=details)])
        return number, False

    def close_round(self, number: int, summary: dict[str, Any]) -> None:
        """Record that a round is complete."""
        self.append([Entry("closed", number, details=summary)])

    def rounds(self, summaries: bool = True) -> list[RoundRow]:
        """All rounds, oldest first.

        Args:
            summaries: Without, ``summary`` is empty: it holds the decision on every scan, which takes long to read.
        """
        rows: dict[int, RoundRow] = {}
        bare = () if summaries else ("closed",)
        for e in self.events(kinds=("opened", "failed", "closed", "rolled back"), bare=bare):
            old = rows.get(e.round or 0)
            if e.kind == "opened":
                rows[e.round or 0] = RoundRow(e.round or 0, "open", e.time, e.seq)
            elif old and e.kind == "failed":
                rows[old.number] = RoundRow(old.number, old.state, old.opened, old.seq, error=e.details.get("error"))
            elif old and e.kind == "closed":
                rows[old.number] = RoundRow(
                    old.number, "done", old.opened, old.seq, e.time, e.details, closed_seq=e.seq
                )
            elif old:
                rows[old.number] = replace(old, state="rolled back")
        return [rows[n] for n in sorted(rows)]

    # masks

    def masks(self, tag: str, before: int | None = None, cases: Sequence[str] | None = None) -> dict[str, Event]:
        """The last event (``mask`` or ``removed``) about each label file of a tag.

        Args:
            tag: ``original`` or ``aslseg_pseudo``.
            before: Only events before this one are considered.
            cases: Only of these.
        """
        where = "tag = ? AND kind IN ('mask', 'removed') AND seq < ?"
        values: list[Any] = [tag, 2**62 if before is None else before]
        if cases is not None:
            where += f" AND case_id IN ({', '.join('?' * len(cases))})"
            values += cases
        return {e.case or "": e for e in self._select(where, values)}

    def promotions(self, active_only: bool = True, newest: int | None = None) -> list[Promotion]:
        """Promoted masks, oldest first.

        Args:
            active_only: Without those that are trained on no longer.
            newest: Only the newest of all, so many.
        """
        undone = {r.number for r in self.rounds(summaries=False) if r.state == "rolled back"}
        withdrawn = {e.round for e in self.events(kinds=("withdrawn",))}
        events = self._select("kind = 'mask' AND tag = 'aslseg_pseudo'", [], "seq DESC")
        promoted = list(islice((e for e in events if e.details.get("restored") is None), newest))[::-1]
        now = self.masks("aslseg_pseudo", cases=None if newest is None else sorted({e.case or "" for e in promoted}))
        found = []
        for e in promoted:
            current = now[e.case or ""]
            active = current.seq == e.seq or current.details.get("restored") == e.seq
            otherwise = "withdrawn" if e.round in withdrawn else "demoted"
            status = "active" if active else "rolled back" if e.round in undone else otherwise
            if active or not active_only:
                kept: dict[str, Any] = {k: e.details[k] for k in ("sha256", "agreement", "threshold", "models")}
                found.append(Promotion(case=e.case or "", round=e.round or 0, time=e.time, status=status, **kept))
        return found

    # scores and validation

    def set_scores(self, scores: Iterable[Score]) -> None:
        """Replace the agreement of all scans by these; an event holds their hash, if that is another one."""
        now, kept = utc(), sorted(scores, key=lambda s: s.case)
        numbers = {s.round for s in kept}
        scored = (numbers.pop() if len(numbers) == 1 else None), {"sha256": scores_hash(kept), "cases": len(kept)}
        with self._write() as db:
            db.execute("DELETE FROM scores")
            db.executemany(
                "INSERT INTO scores VALUES (?, ?, ?, ?, ?)",
                [(s.case, s.round, now, s.agreement, json.dumps(s.details, sort_keys=True)) for s in kept],
            )
            if self._last_scored(db) != scored:
                insert(db, [Entry("scored", scored[0], details=scored[1])])

    def scores(self, lowest: int | None = None) -> list[Score]:
        """Current agreements, lowest first (ties by id); all, or so many."""
        with self._read() as db:
            return scores_of(db, "agreement, case_id", lowest) if db else []

    def agreements(self) -> dict[str, float]:
        """Case to agreement, without the details."""
        with self._read() as db:
            return dict(db.execute("SELECT case_id, agreement FROM scores").fetchall() if db else ())

    def validation_patients(self, patients: Mapping[str, str] | None = None, before: float = math.inf) -> set[str]:
        """Patients ever chosen to validate models, before an event, also as ``patients`` (by case) names them now."""
        events, now = [e for e in self.events(kinds=("validation",)) if e.seq < before], patients or {}
        named = {e.details["patient"] for e in events}  # without a table a case is its own patient
        return named | {now[c] for c in named.union(*(e.details.get("cases", ()) for e in events)) & now.keys()}

    # the chain

    def append(self, entries: Iterable[Entry]) -> list[Event]:
        """Append events in one transaction, on disk when this returns.

        Raises:
            LedgerError: The file is damaged, of a newer version, or in use by another process for a minute.
        """
        with self._write() as db:
            return insert(db, entries)

    def events(
        self,
        kinds: tuple[str, ...] = (),
        tag: str | None = None,
        number: int | None = None,
        case: str | None = None,
        bare: tuple[str, ...] = (),
    ) -> list[Event]:
        """Events in order, all or those of some kinds, a tag, a round, a case.

        Args:
            kinds, tag, number, case: Only these.
            bare: Kinds whose events come without details and hashes, which is quicker where the details are large.
        """
        where, values = ["1"], []
        if kinds:
            where.append(f"kind IN ({', '.join('?' * len(kinds))})")
            values += list(kinds)
        for column, value in (("tag", tag), ("round", number), ("case_id", case)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)  # type: ignore[arg-type]
        return list(self._select(" AND ".join(where), values, bare=bare))

    def details(self, seq: int) -> dict[str, Any]:
        """The details of one event; empty if there is none with this number."""
        return next((e.details for e in self._select("seq = ?", [seq])), {})

    def head(self) -> Head:
        """How many events there are, and the hash of the last one."""
        with self._read() as db:
            return head_of(db) if db else Head(0, START)

    def accept_head(self) -> None:
        """Keep the present head, whatever the file says; after a repair."""
        with self._write() as db:
            write_head(self.anchor, head_of(db))

    def loss(self) -> str | None:
        """What the file beside the ledger knows and the ledger does not; None if nothing is missing.

        The file may be behind: a process that is killed between an event and its head leaves it so.
        """
        known = read_head(self.anchor)
        return self.contradiction(known) if known else None

    def contradiction(self, known: Head) -> str | None:
        """How the ledger differs from a head that it once had; None if that is one of its events."""
        if not known.events:
            return None
        with self._read() as db:
            return contradiction_of(db, known) if db else f"the file is gone; it had {known.events} events"

    def require_whole(self) -> None:
        """Nothing may be decided on a ledger that lost events.

        Raises:
            LedgerError: It did, or cannot be read.
        """
        problem = self.loss()
        if problem:
            raise LedgerError(
                f"{self.path}: {problem}. Restore it from a backup, or run `aslseg ledger verify --repair` to go on "
                "with what labels and reports say"
            )

    def last_by_kind(self, after: int = 0) -> dict[str, int]:
        """The number of the last event of each kind, of the kinds that have one after this number."""
        with self._read() as db:
            query = "SELECT kind, max(seq) FROM events WHERE seq > ? GROUP BY +kind"
            return dict(db.execute(query, [after]).fetchall() if db else ())

    def last_seq(self, kinds: tuple[str, ...]) -> int:
        """The number of the last event of some kinds, 0 without any: as long as it stays, so do these events."""
        with self._read() as db:
            query = f"SELECT max(seq) FROM events WHERE kind IN ({', '.join('?' * len(kinds))})"  # noqa: S608
            row = db.execute(query, kinds).fetchone() if db else None
        return int(row[0] or 0) if row else 0

    def verify(self) -> str | None:
        """Recompute the hash chain, and compare it with its head and with the scores.

        Returns:
            None if all is as it was written, else the first thing that is not.
        """
        broken = self.broken_chain()
        if broken:
            return broken
        if read_head(self.anchor) is None and self.head().events:
            return f"{self.anchor.name}, which holds the number of events, is missing or damaged"
        return self.loss() or self.changed_scores()

    def broken_chain(self) -> str | None:
        """The first event that is missing or was changed."""
        expected, hash_before = 1, START
        with self._read() as db:
            for event, clock in events_of(db) if db else ():
                if event.seq != expected:
                    return f"event {expected} is missing"
                if event.previous != hash_before or event.digest(clock) != event.hash:
                    return f"event {event.seq} ({event.kind}, {event.time}) was changed after it was written"
                expected, hash_before = expected + 1, event.hash
        return None

    def changed_scores(self) -> str | None:
        """Whether the agreements are others than those that were written."""
        with self._read() as db:
            last = self._last_scored(db) if db else None
            if db is None or last is None or scores_hash(scores_of(db)) == last[1]["sha256"]:
                return None
        return "the agreements were changed after they were written; the next round writes them again"

    @staticmethod
    def _last_scored(db: sqlite3.Connection) -> tuple[int | None, dict[str, Any]] | None:
        """Round and details of the last event about scores; version 0.1 wrote none."""
        row = db.execute("SELECT round, details FROM events WHERE kind = 'scored' ORDER BY seq DESC LIMIT 1").fetchone()
        return (row[0], json.loads(row[1])) if row else None

    def _select(self, where: str, values: list[Any], order: str = "seq", bare: tuple[str, ...] = ()) -> Iterator[Event]:
        with self._read() as db:
            for event, _ in events_of(db, where, values, order, bare) if db else ():
                yield event

    def hold(self) -> sqlite3.Connection | None:
        """A connection for a process that appends often to keep: without one, SQLite clears up its log after each call.

        Returns:
            Nothing to work with; None without a ledger.
        """
        if not self.path.exists():
            return None
        held = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        with suppress(sqlite3.Error):  # where something is wrong, the next call says so
            held.execute("SELECT max(seq) FROM events").fetchall()  # only now it has the file open
        return held

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
            self._keep_head(db)

    def _keep_head(self, db: sqlite3.Connection) -> None:
        """Write the new head; what fails or is killed here leaves one that is behind, which the next event mends."""
        try:
            db.execute("BEGIN IMMEDIATE")  # so that heads are written in the order of the events
            try:
                known, now = read_head(self.anchor), head_of(db)
                problem = f"{self.anchor.name} is missing" if known is None else contradiction_of(db, known)
                if problem:
                    logger.error("%s: %s; run `aslseg ledger verify`", self.path, problem)
                elif known != now:
                    write_head(self.anchor, now)
            finally:
                db.execute("ROLLBACK")
        except (sqlite3.Error, OSError) as error:
            logger.warning("%s was not written (%s); the next event writes it", self.anchor, error)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection for one call, so that threads share nothing."""
        try:
            db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                write_ahead(db)
                db.execute("PRAGMA synchronous = FULL")
                self._prepare(db)
                yield db
            finally:
                db.close()
        except sqlite3.Error as error:
            code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
            # without room for its log SQLite speaks of an I/O error
            if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and nearly_full(self.path.parent)):
                raise DiskFullError(f"disk full while writing {self.path}; free some space and run again") from error
            if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR):
                raise LedgerError(f"{self.path}: {error}; check the disk and its permissions") from error
            if code == sqlite3.SQLITE_BUSY:
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
        if version < VERSION:
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            try:
                for statement in SCHEMA if version == 0 else ():
                    db.execute(statement)
                if version < VERSION:
                    self._keep_first_head(db, version)
                db.execute("COMMIT")
            except OSError as error:
                db.execute("ROLLBACK")
                if version == 0:
                    raise
                logger.warning("%s: its head cannot be kept yet (%s)", self.path, error)

    def _keep_first_head(self, db: sqlite3.Connection, version: int) -> None:
        """From now on a ledger without the file of its head has lost it. One that lost the ledger keeps its own."""
        if not self.anchor.exists():
            write_head(self.anchor, head_of(db))
            if version == 1:
                logger.info("%s is of version 0.1: its head is kept in %s from now on", self.path, self.anchor.name)
        db.execute(f"PRAGMA user_version = {VERSION}")
