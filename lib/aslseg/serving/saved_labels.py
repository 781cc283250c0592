"""What people saved, deleted or were refused, as the ledger recorded it, compared with the files that are there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monailabel.datastore.local import DataModel

from aslseg.errors import AslsegError
from aslseg.files import sha256
from aslseg.rounds.ledger import Entry, Ledger
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

    def record_saved(self, case: str, tag: str, info: dict[str, Any]) -> None:
        """Append that a label is about to be written; ``info`` holds its ``sha256``."""
        self._append(SAVED, case, tag, {"sha256": info["sha256"], "by": info.get("user"), "info": info})

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
        except AslsegError as error:
            try:
                about = {"by": info.get("user"), "why": str(error), "sha256": sha256(source)}
                self._append(REFUSED, case, tag, about)
            except (AslsegError, OSError) as other:
                logger.warning("a refusal could not be recorded: %s", other)
            raise

    def _append(self, kind: str, case: str, tag: str, details: dict[str, Any]) -> None:
        self.ledger.append([Entry(kind, case=case, tag=tag, details=details)])
        self._all = None

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
