"""What rounds decided, read from the ledger again only when that has changed: with thousands of scans it takes long."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aslseg.files import FileStamp
from aslseg.rounds.ledger import Ledger, Promotion, RoundRow, Score

MOST = 50
"""Entries of each list."""
DECIDED = ("opened", "failed", "closed", "withdrawn", "rolled back", "mask", "removed", "scored", "veto")
"""Events that the lists are made of; labels that people save are none."""


@dataclass(frozen=True)
class Decisions:
    """All rounds, oldest first; the lowest scores and the newest promotions, :data:`MOST` of each."""

    rounds: tuple[RoundRow, ...] = ()
    scores: tuple[Score, ...] = ()
    promotions: tuple[Promotion, ...] = ()


def decisions(ledger: Ledger) -> Decisions:
    """What rounds decided.

    Raises:
        LedgerError: The ledger is damaged, or in use.
    """
    stamp = FileStamp.of(ledger.path)
    return _read(ledger.path, stamp and stamp.inode, ledger.last_seq(DECIDED))


@lru_cache(maxsize=8)
def _read(path: Path, inode: int | None, last: int) -> Decisions:
    ledger = Ledger(path)
    newest = reversed(ledger.promotions(active_only=False))
    return Decisions(tuple(ledger.rounds()), tuple(ledger.scores()[:MOST]), tuple(newest)[:MOST])
