"""What rounds decided, read from the ledger again only when that has changed: with thousands of scans it takes long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aslseg.files import FileStamp
from aslseg.rounds.ledger import Ledger, Promotion, RoundRow, Score
from aslseg.rounds.promotion_decisions import Decision, count_reasons, decisions_of

MOST = 50
"""Entries of each list."""
DECIDED = ("opened", "failed", "closed", "withdrawn", "rolled back", "mask", "removed", "scored", "veto")
"""Events that the lists are made of; labels that people save are none."""


@dataclass(frozen=True)
class Decisions:
    """All rounds, oldest first; the lowest scores and the newest promotions, :data:`MOST` of each.

    ``not_promoted`` is None before the first round has ended; ``flagged`` are scans whose masks are worth a look.
    """

    rounds: tuple[RoundRow, ...] = ()
    scores: tuple[Score, ...] = ()
    promotions: tuple[Promotion, ...] = ()
    not_promoted: dict[str, Any] | None = None
    flagged: tuple[dict[str, Any], ...] = ()


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
    rounds, scores = tuple(ledger.rounds()), ledger.scores()
    closed = [r for r in rounds if r.closed]
    decided = decisions_of(closed[-1], scores) if closed else []
    left = _not_promoted(closed[-1], decided) if closed else None
    flagged = ({"case": d.case, "promoted": d.promoted, "flags": list(d.flags)} for d in decided if d.flags)
    return Decisions(rounds, tuple(scores[:MOST]), tuple(newest)[:MOST], left, tuple(flagged)[:MOST])


def _not_promoted(row: RoundRow, decided: Sequence[Decision]) -> dict[str, Any]:
    """Why a round left scans out: reasons with their number of scans, then the scans."""
    left = [d for d in decided if not d.promoted]
    return {
        "round": row.number,
        "total": len(left),
        "reasons": [{"reason": kind, "scans": count} for kind, count in count_reasons(left)][:MOST],
        "scans": [
            {"case": d.case, "agreement": d.agreement, "per_label": d.per_label, "reasons": list(d.reasons)}
            for d in left[:MOST]
        ],
    }
