"""Runs a round in a process of its own and kills it in the middle of its writing; imported by that process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from durable_writes import at_number, at_point, die, nothing, watched

from aslseg.rounds.run import run_round
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.settings import Settings
from tiny_rounds import make_tiny


def run(studies: Path, settings: Settings, die_at: int | None, before: bool) -> None:
    """A round that is killed at its n-th durable write.

    Args:
        studies, settings: As for a round.
        die_at: Which write, from 1; None lives.
        before: Die with the new file complete under its temporary name, or right after it has its name.
    """
    make_tiny()
    hook = at_number(die_at, die) if die_at else nothing
    with watched(hook) if before else watched(nothing, hook):
        run_round(studies, settings)


def run_to_point(
    studies: Path, settings: Settings, point: str | None, occurrence: int, good: str | None, number: int | None = None
) -> None:
    """A round that is killed just before a certain durable write, or whose write the disk refuses.

    Args:
        studies, settings: As for a round.
        point: Pattern of the write, see :func:`durable_writes.watched`; None lives.
        occurrence: Which of the writes that match.
        good: SHA-256 of the only SSL model that validates well; None: all are equally good.
        number: Error number of the disk; None: killed.
    """
    make_tiny()
    dice = RoundPipeline.dice

    def known(self: Any, maps: Any, cases: Any = None) -> float | None:
        inputs = json.loads((maps.folder / "inputs.json").read_text())
        ssl = set(inputs) == {"ssl", "settings"}
        return (0.9 if good in (None, inputs["ssl"]) else 0.1) if ssl else dice(self, maps, cases)

    def refuse() -> None:
        raise OSError(number, os.strerror(number or 0))

    RoundPipeline.dice = known  # type: ignore[method-assign]
    with watched(at_point(point, occurrence, refuse if number else die) if point else nothing):
        run_round(studies, settings)
