"""The tables of the ledger, and the mode in which SQLite writes them."""

from __future__ import annotations

import sqlite3
import time

BUSY_SECONDS = 60
"""How long to wait for another process's transaction."""
VERSION = 2
"""1: of version 0.1, which kept no head."""
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


def write_ahead(db: sqlite3.Connection) -> None:
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
