"""What a request would otherwise wait for after a start or a round, made ready in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NoReturn

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""A look at what has not changed takes some milliseconds."""


def keep_ready(once: Callable[[], object], often: Callable[[], object]) -> None:
    """Call functions in a thread that ends with the process: one now, then the other again and again.

    A call that fails is logged, once while its error stays the same; the request that needs its result meets the same
    error and says so.
    """
    said = ""

    def tried(call: Callable[[], object]) -> None:
        nonlocal said
        try:
            call()
            now = ""
        except Exception as error:
            now = str(error) or type(error).__name__
        if now and now != said:
            logger.warning("nothing was made ready: %s", now)
        said = now

    def run() -> NoReturn:
        tried(often)
        tried(once)
        while True:
            time.sleep(LOOK_SECONDS)
            tried(often)

    threading.Thread(target=run, name="aslseg-made-ready", daemon=True).start()
