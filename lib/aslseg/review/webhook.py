"""The headline of a report, sent to an address that somebody gave."""

from __future__ import annotations

import json
import logging
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10


def send(address: str, content: dict[str, Any]) -> bool:
    """POST JSON to an http or https address; a failure is a line in the log and nothing else.

    Args:
        address: It may hold a secret, so the log names its host only.
        content: JSON-serialisable.

    Returns:
        Whether it was accepted.
    """
    request = urllib.request.Request(  # noqa: S310 - the setting accepts http and https only
        address, json.dumps(content).encode(), {"Content-Type": "application/json", "User-Agent": "ASLseg"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):  # noqa: S310
            return True
    except (OSError, ValueError, HTTPException) as error:  # urllib's and the socket's errors are OSErrors
        logger.warning("report_webhook: %s did not take the headline (%s)", urlsplit(address).hostname, _reason(error))
        return False


def _reason(error: Exception) -> str:
    code = getattr(error, "code", None)
    return f"HTTP {code}" if code else type(getattr(error, "reason", error)).__name__
