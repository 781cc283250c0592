"""The server's log: plain lines or JSON, and without the ids of scans where they may be names of patients."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from aslseg.files import atomic_file
from aslseg.settings import Paths, Settings
from aslseg.volume.io import case_id

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message`` and, with an error, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """As :meth:`logging.Formatter.format`."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


class CaseIdHider(logging.Formatter):
    """Another formatter's lines, tracebacks included, with a keyed hash in place of each id of a scan.

    Args:
        inner: The formatter.
        is_case: Whether a word is the id of a scan.
        key: Without it nobody can try names of patients until a hash fits.
    """

    def __init__(self, inner: logging.Formatter, is_case: Callable[[str], bool], key: bytes) -> None:
        super().__init__()
        self.inner, self.is_case, self.key = inner, is_case, key

    def format(self, record: logging.LogRecord) -> str:
        """As :meth:`logging.Formatter.format`."""
        return WORD.sub(self._hidden, self.inner.format(record))

    def _hidden(self, found: re.Match[str]) -> str:
        word = found[0]
        bare = word.rstrip(".")  # an id may end a sentence
        case = next((c for c in (word, bare, case_id(Path(bare)), bare.partition(".")[0]) if self.is_case(c)), None)
        if case is None:
            return word
        return word.replace(case, f"case-{hashlib.blake2b(case.encode(), key=self.key, digest_size=5).hexdigest()}")


def configure_logs(settings: Settings, paths: Paths, is_case: Callable[[str], bool]) -> None:
    """Change the formatters of all log handlers of this process as the settings say."""
    for handler in _handlers():
        formatter = handler.formatter or logging.Formatter()
        if settings.log_format == "json":
            formatter = JsonFormatter()
        if settings.log_case_ids == "hashed":
            formatter = CaseIdHider(formatter, is_case, _key(paths.home / "log.key"))
        handler.setFormatter(formatter)


def _handlers() -> Iterable[logging.Handler]:
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return {id(h): h for logger in loggers for h in logger.handlers}.values()


def _key(path: Path) -> bytes:
    """The key of a studies folder's hashes, made when it is first needed."""
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()
