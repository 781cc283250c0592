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
from urllib.parse import unquote_plus

from aslseg.files import atomic_file
from aslseg.settings import Paths, Settings
from aslseg.volume.io import case_id

WORD = re.compile(r"[\w%][\w%+.-]*")
MOST_WORDS = 5
"""An id of a file that somebody named may hold blanks; so many words are tried together."""


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
        text = self.inner.format(record)
        words, pieces, done, n = list(WORD.finditer(text)), [], 0, 0
        while n < len(words):
            last = min(n + MOST_WORDS, len(words)) - 1
            spans = ((m, words[n].start(), words[m].end()) for m in range(last, n - 1, -1))
            found = next((span for span in spans if self._case(text[span[1] : span[2]], span[0] == n)), None)
            if found is not None:
                n, start, end = found
                pieces += [text[done:start], self._hidden(text[start:end])]
                done = end
            n += 1
        return "".join([*pieces, text[done:]])

    def _case(self, text: str, one_word: bool = True) -> str | None:
        """The id of a scan that a piece of the log is, also as the name of its file or in an address; else None."""
        bare = text.rstrip(".")  # an id may end a sentence
        tried = [text, bare, case_id(Path(bare))] + ([bare.partition(".")[0]] if one_word else [])
        return next((c for name in tried for c in (name, unquote_plus(name)) if self.is_case(c)), None)

    def _hidden(self, text: str) -> str:
        case = self._case(text) or ""
        shown = f"case-{hashlib.blake2b(case.encode(), key=self.key, digest_size=5).hexdigest()}"
        return text.replace(case, shown) if case in text else shown


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
