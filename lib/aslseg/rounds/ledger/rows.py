"""The rows of the ledger's tables as values, and back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from aslseg.rounds.ledger.anchor import Head
from aslseg.rounds.ledger.events import NO_CLOCK, Entry, Event, Score
from aslseg.rounds.ledger.schema import INSERT, START

SMALL = ("seq", "time", "clock", "kind", "round", "case_id", "tag")
LARGE = ("details", "previous", "hash")
"""The details, and the columns that lie behind them in the file."""


def insert(db: sqlite3.Connection, entries: Iterable[Entry]) -> list[Event]:
    """Append to the chain, within a transaction."""
    events, head = [], head_of(db)
    for e in entries:
        details = json.loads(json.dumps(e.details))
        event = Event(e.kind, e.round, e.case, e.tag, details, head.events + 1, utc(), head.sha256)
        head = Head(event.seq, event.digest())
        about = (event.seq, event.time, NO_CLOCK, e.kind, e.round, e.case, e.tag)
        db.execute(INSERT, (*about, json.dumps(details, sort_keys=True), event.previous, head.sha256))
        events.append(replace(event, hash=head.sha256))
    return events


def events_of(
    db: sqlite3.Connection,
    where: str = "1",
    values: Sequence[Any] = (),
    order: str = "seq",
    bare: Sequence[str] = (),
) -> Iterator[tuple[Event, int]]:
    """Events with their column ``clock``.

    Args:
        db: The ledger.
        where, order: SQL of our own, with a ``?`` for each of ``values``.
        values: What the clause asks for.
        bare: Kinds of which the details and hashes are not read: they lie behind megabytes in the file.
    """
    kinds = ", ".join("?" * len(bare))
    columns = [f"CASE WHEN kind IN ({kinds}) THEN NULL ELSE {c} END" for c in LARGE] if bare else list(LARGE)
    query = f"SELECT {', '.join((*SMALL, *columns))} FROM events WHERE {where} ORDER BY {order}"  # noqa: S608
    for row in db.execute(query, [*bare] * len(LARGE) * bool(bare) + [*values]):
        seq, at, clock, kind, number, case, tag, details, previous, digest = row
        about = json.loads(details) if details else {}
        yield Event(kind, number, case, tag, about, seq, at, previous or "", digest or ""), clock


def head_of(db: sqlite3.Connection) -> Head:
    """How many events there are, and the hash of the last one."""
    return Head(*(db.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone() or (0, START)))


def contradiction_of(db: sqlite3.Connection, known: Head) -> str | None:
    """How the ledger differs from a head that it once had."""
    row = db.execute("SELECT hash FROM events WHERE seq = ?", [known.events]).fetchone()
    if row is None and known.events:
        return f"{known.events - head_of(db).events} of {known.events} events are missing at its end"
    if row is not None and row[0] != known.sha256:
        return f"event {known.events} is another one than was written"
    return None


def scores_of(db: sqlite3.Connection, order: str = "case_id", most: int | None = None) -> list[Score]:
    """Current agreements in an order (SQL of our own), so many at most."""
    query = f"SELECT case_id, round, agreement, details, time FROM scores ORDER BY {order} LIMIT ?"  # noqa: S608
    rows = db.execute(query, [-1 if most is None else most]).fetchall()
    return [Score(case, number, value, json.loads(details), at) for case, number, value, details, at in rows]


def utc() -> str:
    """Now, as events note it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
