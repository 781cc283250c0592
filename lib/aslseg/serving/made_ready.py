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

    A call that fails is logged; the request that needs its result meets the same error and says so.
    """

    def run() -> NoReturn:
        _tried(often)
        _tried(once)
        while True:
            time.sleep(LOOK_SECONDS)
            _tried(often)

    threading.Thread(target=run, name="aslseg-made-ready", daemon=True).start()


def _tried(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:
        logger.warning("nothing was made ready: %s", error)
