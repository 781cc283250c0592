"""Runs a round in a process of its own and kills it in the middle of its writing; imported by that process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aslseg.rounds.ledger import Ledger
from aslseg.rounds.run import run_round
from aslseg.settings import Settings
from tiny_rounds import make_tiny

# written again by every run: dying at these would never get anywhere
NOT_COUNTED = ("progress.json", "round.owner.json", "new.nii.gz")


def run(studies: Path, settings: Settings, die_at: int | None, before: bool) -> None:
    """A round that is killed at its n-th durable write: a file that gets its name, or a ledger transaction.

    Args:
        studies, settings: As for a round.
        die_at: Which write, from 1; None lives.
        before: Die with the new file complete under its temporary name, or right after it has its name.
    """
    make_tiny()
    count = 0

    def watched(write: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def wrapper(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += counts(*args)
            dies = counts(*args) and count == die_at
            if dies and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(*args, **more)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    os.replace = watched(os.replace, lambda source, target: Path(target).name not in NOT_COUNTED)  # type: ignore[assignment]
    Ledger.append = watched(Ledger.append, lambda ledger, entries: bool(entries))  # type: ignore[method-assign]
    run_round(studies, settings)
