"""Whether the server can do its work, for whoever watches it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from monailabel.interfaces.datastore import Datastore

from aslseg.errors import AslsegError
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.settings import Paths, Settings
from aslseg.volume.io import require_free_disk


def check_health(paths: Paths, settings: Settings, store: Datastore) -> dict[str, Any]:
    """Try what saving a label needs.

    Returns:
        ``status`` (``ok`` or ``failing``) and ``checks``: the name of each check to ``ok`` or to what is wrong. It
        holds no id of a scan.
    """
    checks: dict[str, Callable[[], None]] = {
        "studies": lambda: _require_writable(paths),
        "disk": lambda: require_free_disk(paths.home, settings.min_free_gb),
        "ledger": lambda: _require_readable(paths),
        "lock": getattr(store, "require_unlocked", lambda: None),
    }
    found = {name: _outcome(check) for name, check in checks.items()}
    recovered = getattr(store, "recovered", "")
    failing = any(outcome != "ok" for outcome in found.values())
    return {"status": "failing" if failing else "ok", "checks": found} | ({"recovered": recovered} if recovered else {})


def _outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except (AslsegError, OSError) as error:
        return str(error)
    return "ok"


def _require_writable(paths: Paths) -> None:
    for folder in (paths.studies, paths.home):
        if folder is not None and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not there or cannot be written")


def _require_readable(paths: Paths) -> None:
    ledger = Ledger(paths.ledger)
    ledger.validation_patients()
    ledger.require_whole()
