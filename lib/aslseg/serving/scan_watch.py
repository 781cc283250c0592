"""Headers of the scans, read in the background so that the status page can name what is unusual about them."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from aslseg.cases.scan_checks import ScanChecks
from aslseg.serving.listing import ScanListing

logger = logging.getLogger(__name__)

LOOK_SECONDS = 30.0
PAUSE_SECONDS = 0.002
SHARE = 10
"""It rests this many times as long as a header took: thousands of them, after a start, delay no request."""


def watch_headers(folder: Path, checks: ScanChecks) -> None:
    """Start a thread that reads the headers of the scans in a studies folder now and whenever the folder changes."""
    threading.Thread(target=_watch, args=(folder, checks), name="aslseg-headers", daemon=True).start()


def look_at_headers(folder: Path, checks: ScanChecks) -> None:
    """Read the headers that were not read before."""
    listing = ScanListing(folder)
    listing.changed()
    for name in filter(None, map(listing.scan, list(listing.files))):
        began = time.monotonic()
        checks.look(folder / name)
        time.sleep(max(PAUSE_SECONDS, SHARE * (time.monotonic() - began)))


def _watch(folder: Path, checks: ScanChecks) -> None:
    seen: int | None = None
    while True:
        try:
            changed = folder.stat().st_mtime_ns
            if changed != seen:
                look_at_headers(folder, checks)
                seen = changed
        except OSError as error:  # a network disk that is away for a while
            logger.warning("the headers in %s were not read: %s", folder, error)
        time.sleep(LOOK_SECONDS)
