"""What stands in the ledger: events, and what they amount to for rounds, promotions and scores. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

NO_CLOCK = 0
"""Value of the column ``clock``, which only events of version 0.1 use; their hashes depend on it."""


@dataclass(frozen=True)
class Entry:
    """An event to be appended.

    Attributes:
        kind: ``opened``, ``failed``, ``closed``, ``withdrawn``, ``rolled back`` (rounds); ``mask``, ``removed`` (label
            files of rounds); ``scored`` (agreement of all scans); ``published``; ``validation``; ``veto`` (a mask or a
            model that somebody took back); ``saved``, ``deleted``, ``refused`` (by people, through the server);
            ``audit``, ``checked`` (a mask drawn for a person, and its Dice); ``compared`` (a mask that was shown
            and the label that a person saved); ``fresh`` (Dice of the served models with a label that is new to them);
            ``labels`` (which values label files hold, as a person said);
            ``lost`` (what a repair could not bring back); ``note``.
        round, case, tag: What it is about, where that applies.
        details: JSON-serialisable.
    """

    kind: str
    round: int | None = None
    case: str | None = None
    tag: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event(Entry):
    """An appended event, with its place in the chain and its UTC time."""

    seq: int = 0
    time: str = ""
    previous: str = ""
    hash: str = ""

    def digest(self, clock: int = NO_CLOCK) -> str:
        """SHA-256 over everything else, the previous hash and the row's ``clock`` included."""
        content = [self.seq, self.time, clock, self.kind, self.round, self.case, self.tag, self.details]
        text = json.dumps([*content, self.previous], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RoundRow:
    """A round, as its events describe it; ``seq`` and ``closed_seq`` are the events that opened and closed it."""

    number: int
    state: Literal["open", "done", "rolled back"]
    opened: str
    seq: int
    closed: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    closed_seq: int | None = None


@dataclass(frozen=True)
class Promotion:
    """A promoted mask; ``status`` is ``active``, ``demoted``, ``withdrawn`` (with its round) or ``rolled back``."""

    case: str
    round: int
    time: str
    sha256: str
    agreement: dict[str, float | None]
    threshold: dict[str, float]
    models: dict[str, str]
    status: str


@dataclass(frozen=True)
class Score:
    """The current agreement of one scan; ``agreement`` is the mean over its labels."""

    case: str
    round: int | None
    agreement: float
    details: dict[str, Any]
    time: str = ""


def scores_hash(scores: Iterable[Score]) -> str:
    """SHA-256 of scores in the order of their cases, without times."""
    text = json.dumps([[s.case, s.round, float(s.agreement), s.details] for s in scores], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
