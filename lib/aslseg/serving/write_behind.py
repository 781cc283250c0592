"""A file that is written by a thread, soon after it was asked for and never so often that others notice."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

SHARE = 20
"""The thread rests this many times as long as the last writing took: it takes at most a twentieth of one core."""
RETRY_SECONDS = 10.0
FIRST_SECONDS = 0.5
"""Between a request and the writing, in which whoever asked gets an answer: threads take turns to compute."""


class WriteBehind:
    """Calls a function in a thread of its own after each :meth:`request`; several requests may share one call.

    Args:
        write: Writes what there is now. Where it fails, that is logged and tried again.
        wanted: Whether it still makes sense to write; asked before each try.
    """

    def __init__(self, write: Callable[[], None], wanted: Callable[[], bool]) -> None:
        self.write, self.wanted = write, wanted
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._requested = self._running = False
        self._rest = 0.0

    def request(self) -> None:
        """Have it written soon; returns at once."""
        with self._lock:
            self._requested = True
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="aslseg-write-behind", daemon=True).start()

    def flush(self) -> None:
        """Write now what was requested and is not yet written."""
        with self._writing:
            with self._lock:
                requested, self._requested = self._requested, False
            if requested:
                self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            self.write()
        except BaseException:
            with self._lock:
                self._requested = True
            raise
        finally:
            self._rest = SHARE * (time.monotonic() - began)

    def _run(self) -> None:
        time.sleep(FIRST_SECONDS)
        said = ""
        while self._goes_on():
            rest = self._rest
            try:
                self.flush()
                said = ""
            except Exception as error:  # whatever it was, the next request must find a thread
                if self.wanted() and str(error) != said:
                    said = str(error)
                    logger.error("not written, and tried again: %s", error, exc_info=not isinstance(error, OSError))
                rest = RETRY_SECONDS
            time.sleep(max(rest, self._rest))

    def _goes_on(self) -> bool:
        """Whether there is something to write; if not, the next request starts another thread."""
        with self._lock:
            self._running = self._requested and self.wanted()
            return self._running
