"""What changed in a datastore since its JSON file was last written, in SQLite: durable at once, and O(1) a change.

The JSON of ten thousand scans takes longer to write than an annotator should wait. So a change is appended here before
it is answered, and the JSON is written behind. Every process that serves the studies applies what the others appended.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monailabel.datastore.local import DataModel

from aslseg.errors import DiskFullError
from aslseg.files import FileStamp
from aslseg.serving.http_errors import RefusedError

logger = logging.getLogger(__name__)

KEPT = 10_000
"""Changes that are kept after they are in the JSON: for other processes, and for a JSON that is damaged later."""
IMAGE = ""
"""In place of a tag where the entry is that of the scan itself."""
BUSY_SECONDS = 10.0
SCHEMA = """
    CREATE TABLE IF NOT EXISTS changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, case_id TEXT, tag TEXT, entry TEXT);
    CREATE TABLE IF NOT EXISTS written (one INTEGER PRIMARY KEY CHECK (one = 1), stamp TEXT, seq INTEGER);
"""


@dataclass(frozen=True)
class Change:
    """The new entry of a scan or of one of its labels.

    Attributes:
        case: Id of the scan.
        tag: Of the label; :data:`IMAGE` for the scan itself.
        entry: None if it was deleted.
    """

    case: str
    tag: str
    entry: DataModel | None


class ChangeLog:
    """The log of one datastore. The caller holds the datastore's lock.

    Args:
        path: SQLite file on a local disk. A damaged one is kept under another name, and a new one begun.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.closed = path, False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = _connect(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise self._refusal(error) from None
            kept = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            os.replace(path, kept)
            for ending in ("-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
            logger.error("%s was damaged (kept as %s); a new one was begun", path.name, kept.name)
            self._db = _connect(path)

    def stamp(self) -> tuple[FileStamp | None, ...]:
        """Changes when any process has appended something."""
        return FileStamp.of(self.path), FileStamp.of(self.path.with_name(f"{self.path.name}-wal"))

    def append(self, changes: Iterable[Change]) -> int:
        """Append changes, on disk when this returns.

        Returns:
            The number of the last one.

        Raises:
            RefusedError: 422, an entry that JSON cannot store; nothing is appended. 503, the file is in use.
            DiskFullError: Nothing is appended.
        """
        rows = [(c.case, c.tag, None if c.entry is None else _checked(c.entry)) for c in changes]
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("INSERT INTO changes (case_id, tag, entry) VALUES (?, ?, ?)", rows)
                return self.last()
        except sqlite3.Error as error:
            raise self._refusal(error) from error

    def last(self) -> int:
        """The number of the last change."""
        (found,) = self._db.execute("SELECT coalesce(max(seq), 0) FROM changes").fetchone()
        return max(int(found), self.written()[1])

    def after(self, seq: int) -> list[Change] | None:
        """The changes after a number, in order; None if some of them are no longer kept."""
        query = "SELECT seq, case_id, tag, entry FROM changes WHERE seq > ? ORDER BY seq"
        try:
            rows = self._db.execute(query, (seq,)).fetchall()
            complete = (rows[0][0] == seq + 1) if rows else seq == self.last()
        except sqlite3.Error as error:
            raise self._refusal(error) from error
        if not complete:
            return None
        return [Change(c, t, None if e is None else DataModel.model_validate_json(e)) for _, c, t, e in rows]

    def kept(self) -> list[Change]:
        """All changes that are kept, in order."""
        (first,) = self._db.execute("SELECT coalesce(min(seq), 1) FROM changes").fetchone()
        return self.after(first - 1) or []

    def written(self) -> tuple[str, int]:
        """Which JSON file a process of ours wrote last, as :func:`stamp_text`, and the last change that is in it."""
        try:
            row = self._db.execute("SELECT stamp, seq FROM written").fetchone()
        except sqlite3.Error as error:
            raise self._refusal(error) from error
        return (str(row[0]), int(row[1])) if row else ("", 0)

    def set_written(self, stamp: FileStamp | None, seq: int) -> None:
        """Record that the JSON file with this stamp holds all changes up to a number."""
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute("INSERT OR REPLACE INTO written VALUES (1, ?, ?)", (stamp_text(stamp), seq))
                self._db.execute("DELETE FROM changes WHERE seq <= ?", (seq - KEPT,))
        except sqlite3.Error as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Close the file; nothing can be read or written after that."""
        self.closed = True
        with suppress(sqlite3.Error):
            self._db.close()

    def _refusal(self, error: sqlite3.Error) -> DiskFullError | RefusedError:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return DiskFullError(f"disk full while writing {self.path.name}; free some space and try again")
        return RefusedError(f"{self.path.name} cannot be used ({error}); nothing was changed. See `aslseg doctor`", 503)


def stamp_text(stamp: FileStamp | None) -> str:
    """A stamp as text."""
    return repr(stamp)


def _connect(path: Path) -> sqlite3.Connection:
    # the datastore's lock lets one thread in at a time
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.executescript(SCHEMA)
    return db


def _checked(entry: DataModel) -> str:
    """An entry as JSON that can be read again.

    Raises:
        RefusedError: 422, it cannot.
    """
    content: dict[str, Any] = entry.model_dump()
    try:
        text = json.dumps(content, default=str)
        DataModel.model_validate_json(text)
    except ValueError:
        raise RefusedError("params: hold a value that JSON cannot store; nothing was saved", 422) from None
    return text
