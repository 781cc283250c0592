"""What people saved, deleted or were refused, as the ledger recorded it, compared with the files that are there."""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monailabel.datastore.local import DataModel

from aslseg.errors import AslsegError
from aslseg.files import sha256
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.serving.shared_json import new_entry

logger = logging.getLogger(__name__)

SAVED, DELETED, REFUSED = "saved", "deleted", "refused"  # kinds of events
COPY_SECONDS = 2.0  # between the file's own time and that in its info, which is in whole seconds


class SavedLabels:
    """The events of one studies folder about what people saved, deleted or were refused.

    Args:
        ledger: Where they are.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._all: dict[tuple[str, str], dict[str, Any]] | None = None
        self._held: sqlite3.Connection | None = None

    def record_saved(
        self, case: str, tag: str, info: dict[str, Any], scan_info: Mapping[str, Any] | None = None
    ) -> None:
        """Append that a label is about to be written.

        Args:
            case: Id of the scan.
            tag: Of the label.
            info: Of the label, with its ``sha256``.
            scan_info: Of the scan, which says when it was handed out.
        """
        opened = handed_out(scan_info or {}, info.get("user"))
        details = {"sha256": info["sha256"], "by": info.get("user"), "info": info}
        self._append(SAVED, case, tag, details | ({} if opened is None else {"handed_out": opened}))

    def record_deleted(self, case: str, tag: str, details: dict[str, Any]) -> None:
        """Append that a file is about to be moved to the trash."""
        self._append(DELETED, case, tag, details)

    @contextmanager
    def refusals(self, case: str, tag: str, source: Path, info: dict[str, Any]) -> Iterator[None]:
        """Append an event where the block refuses an upload; the refusal itself goes on.

        Args:
            case: Id of the scan.
            tag: Tag of the label, or ``image`` for a scan.
            source: The upload.
            info: What came with it; ``user`` is the authenticated name.
        """
        try:
            yield
        except (AslsegError, OSError, MemoryError) as error:
            try:
                why = str(error) or type(error).__name__
                about = {"by": info.get("user"), "why": why, "sha256": sha256(source)}
                self._append(REFUSED, case, tag, about)
            except (AslsegError, OSError) as other:
                logger.warning("a refusal could not be recorded: %s", other)
            raise

    def _append(self, kind: str, case: str, tag: str, details: dict[str, Any]) -> None:
        self.ledger.append([Entry(kind, case=case, tag=tag, details=details)])
        self._all = None
        if self._held is None:
            self._held = self.ledger.hold()

    def forget(self) -> None:
        """Forget what :meth:`all` has read; other processes write the ledger too."""
        self._all = None

    def all(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Case and tag to the details of the last time that a label was saved; read once, for a start."""
        if self._all is None:
            events = self.ledger.events(kinds=(SAVED,))
            self._all = {(e.case or "", e.tag or ""): e.details for e in events}
        return self._all

    def last(self, case: str, tag: str) -> dict[str, Any]:
        """The details of the last time that a label was saved; empty if it never was."""
        if self._all is not None:
            return self._all.get((case, tag), {})
        events = self.ledger.events(kinds=(SAVED,), tag=tag, case=case)
        return events[-1].details if events else {}

    def new_entry(self, case: str, tag: str, path: Path) -> DataModel:
        """An entry for a file that the JSON does not know: with its recorded info if it was saved through a server."""
        saved = self.last(case, tag)
        if saved and sha256(path) == saved["sha256"]:
            return DataModel(info=dict(saved["info"]), ext=path.name[len(case) :])
        return new_entry(case, path.name)

    def checked_entry(self, case: str, tag: str, path: Path, entry: DataModel, thorough: bool = False) -> DataModel:
        """The entry of a label file, or a new one if it describes another file.

        Only files are hashed that were written after their info, or whose last saving the entry does not know;
        ``thorough``: all.
        """
        known, saved = entry.info.get("sha256"), self.last(case, tag)
        if known is None:
            return entry
        later = path.stat().st_mtime > entry.info.get("ts", 0) + COPY_SECONDS
        if not thorough and not later and saved.get("sha256", known) == known:
            return entry
        found = sha256(path)
        if found == known:
            return entry
        logger.error("label %s of %s is another file than its info says", tag, case)
        if found == saved.get("sha256"):
            return DataModel(info=dict(saved["info"]), ext=entry.ext)
        other = new_entry(case, path.name)
        other.info.update(sha256=found, note="this file was not saved through the server")
        return other


def handed_out(scan_info: Mapping[str, Any], person: str | None) -> float | None:
    """When a scan was last handed out to a person, in seconds since 1970; to anybody where that person is not named.

    Args:
        scan_info: With the key ``strategy`` that MONAI Label writes for each strategy at *Next Sample*: ``ts`` and
            ``client_id``. Clients can write it too, so that anything may stand there.
        person: Who saves, if that is known.
    """
    noted = scan_info.get("strategy")
    entries = [e for e in noted.values() if isinstance(e, Mapping)] if isinstance(noted, Mapping) else []
    entries = [e for e in entries if isinstance(e.get("ts"), int | float) and math.isfinite(e["ts"])]
    theirs = [e for e in entries if person and e.get("client_id") == person]
    return max((float(e["ts"]) for e in theirs or entries), default=None)
