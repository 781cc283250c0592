"""What the page shows of a ledger, each part read again only when events that it is made of have come.

A round's summary holds the decision on every scan: with ten thousand scans and thirty rounds 40 MB, of which a page
shows fifty lines. So each summary is read once, and what people save between rounds reads nothing again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from aslseg.errors import LedgerError
from aslseg.rounds.feedback import savings
from aslseg.rounds.gate.fresh import FRESH, pooled
from aslseg.rounds.ledger.anchor import Head
from aslseg.rounds.ledger.audits import AUDIT, CHECKED, kept_since, promise_lines, waiting
from aslseg.rounds.ledger.ledger import Ledger, Promotion, RoundRow, Score
from aslseg.rounds.promotion.decisions import Decision, count_reasons, decisions_of

MOST = 50
"""Entries of each list."""
ROUNDS = ("opened", "failed", "closed", "rolled back")
MASKS = ("mask", "removed", "withdrawn", "rolled back")
AUDITS = (*ROUNDS, AUDIT, CHECKED, "note")
OF_EACH_ROUND = ("out_of_fold", "promise")
"""Of the summary of a round, what is shown of every one."""
NO_ROUND = "no promise yet: it needs audits of promoted masks, and no round has drawn any"
WAIT_SECONDS = 5.0
"""How long a thread waits for another one that reads."""
T = TypeVar("T")


@dataclass(frozen=True)
class Decisions:
    """What the page shows of a ledger; of each list :data:`MOST` entries.

    Attributes:
        rounds: All, oldest first, with :data:`OF_EACH_ROUND` of their summaries.
        scores: The lowest.
        promotions: The newest, newest first.
        not_promoted: Why the last round left scans out; None before the first one has ended.
        flagged: Scans whose masks are worth a look.
        warnings: Of the last round, and the scans that it left out.
        checked: Dice of promoted masks with the labels that came after them, by the mask's hash.
        fresh: :func:`aslseg.rounds.gate.fresh.pooled`.
        promise: What the last round promised, a line for each label.
        audits: How many wait for a label.
        savings: What masks save people, in sentences.
        served: The models that were published last, by kind; None without any.
    """

    rounds: tuple[RoundRow, ...] = ()
    scores: tuple[Score, ...] = ()
    promotions: tuple[Promotion, ...] = ()
    not_promoted: dict[str, Any] | None = None
    flagged: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    checked: dict[str, dict[str, float | None]] = field(default_factory=dict)
    fresh: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    promise: tuple[str, ...] = ()
    audits: int = 0
    savings: tuple[str, ...] = ()
    served: dict[str, Any] | None = None


def decisions(ledger: Ledger) -> Decisions:
    """What rounds decided.

    Raises:
        LedgerError: The ledger is damaged, or in use.
    """
    return _kept(ledger.path).now()


class KeptParts:
    """What was read of one ledger; safe to share between threads, of which one reads and the others wait for it.

    Whoever reads may wait a minute for a ledger that is in use. The others then get what was read last.
    """

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path)
        self._lock = threading.Lock()
        self._newest: Decisions | None = None
        self._forget()

    def now(self) -> Decisions:
        """See :func:`decisions`."""
        if self._lock.acquire(timeout=WAIT_SECONDS):
            try:
                self._newest = self._read()
            finally:
                self._lock.release()
        if self._newest is None:
            raise LedgerError(f"{self.ledger.path.name} has been in use for over {WAIT_SECONDS:g} s; try again later")
        return self._newest

    def _read(self) -> Decisions:
        self._look()
        ledger = self.ledger
        rounds = self._part("rounds", ROUNDS, self._rounds)
        ended = self._part("ended", (*ROUNDS, "scored"), lambda: self._ended(rounds))
        return replace(
            ended,
            rounds=rounds,
            scores=self._part("scores", ("scored",), lambda: tuple(ledger.scores(MOST))),
            promotions=self._part("promotions", MASKS, self._promotions),
            checked=self._part("checked", (CHECKED,), self._checked),
            fresh=self._part("fresh", (FRESH,), lambda: pooled(ledger.events(kinds=(FRESH,)))),
            promise=self._part("promise", AUDITS, lambda: self._promise(rounds)),
            audits=self._part("audits", AUDITS, lambda: len(waiting(ledger))),
            savings=self._part("savings", (savings.COMPARED,), self._savings),
            served=self._part("served", ("published",), self._served),
        )

    def _forget(self) -> None:
        self._head: Head | None = None
        self._last: dict[str, int] = {}
        self._parts: dict[str, tuple[list[int], Any]] = {}
        self._summaries: dict[int, dict[str, Any]] = {}

    def _look(self) -> None:
        """Which kinds of events have come since the last time; everything is forgotten where some have gone."""
        if self._head is not None and self.ledger.contradiction(self._head):
            self._forget()
        head = self.ledger.head()
        if head != self._head:
            self._last |= self.ledger.last_by_kind(self._head.events if self._head else 0)
            self._head = head

    def _part(self, name: str, kinds: Sequence[str], read: Callable[[], T]) -> T:
        mark = [self._last.get(kind, 0) for kind in kinds]
        known = self._parts.get(name)
        if known is None or known[0] != mark:
            known = self._parts[name] = (mark, read())
        found: T = known[1]
        return found

    def _rounds(self) -> tuple[RoundRow, ...]:
        return tuple(replace(r, summary=self._shown(r.closed_seq)) for r in self.ledger.rounds(summaries=False))

    def _shown(self, closed: int | None) -> dict[str, Any]:
        if closed is None:
            return {}
        if closed not in self._summaries:
            summary = self.ledger.details(closed)
            self._summaries[closed] = {name: summary[name] for name in OF_EACH_ROUND if name in summary}
        return self._summaries[closed]

    def _ended(self, rounds: Sequence[RoundRow]) -> Decisions:
        """What is shown of the last round that has ended."""
        row = next((r for r in reversed(rounds) if r.closed_seq), None)
        if row is None or row.closed_seq is None:
            return Decisions()
        whole = replace(row, summary=self.ledger.details(row.closed_seq))
        # rounds of earlier versions kept no decisions of their own
        decided = decisions_of(whole, () if "decisions" in whole.summary else self.ledger.scores())
        flagged = ({"case": d.case, "promoted": d.promoted, "flags": list(d.flags)} for d in decided if d.flags)
        left_out = map(named, whole.summary.get("skipped", {}).items())
        return Decisions(
            not_promoted=_not_promoted(row, decided),
            flagged=tuple(flagged)[:MOST],
            warnings=(*whole.summary.get("warnings", ()), *left_out),
        )

    def _promotions(self) -> tuple[Promotion, ...]:
        return tuple(reversed(self.ledger.promotions(active_only=False, newest=MOST)))

    def _checked(self) -> dict[str, dict[str, float | None]]:
        return {e.details["mask"]: e.details["dice"] for e in self.ledger.events(kinds=(CHECKED,))}

    def _promise(self, rounds: Sequence[RoundRow]) -> tuple[str, ...]:
        ended = [r.summary for r in rounds if r.state == "done"]
        if not ended:
            return (NO_ROUND,)
        return tuple(promise_lines(ended[-1].get("promise", {}), kept_since(self.ledger, rounds)))

    def _savings(self) -> tuple[str, ...]:
        return tuple(savings.in_words(savings.savings(self.ledger)))

    def _served(self) -> dict[str, Any] | None:
        seq = self._last.get("published")
        return self.ledger.details(seq)["after"] if seq else None


@lru_cache(maxsize=8)
def _kept(path: Path) -> KeptParts:
    return KeptParts(path)


def named(skipped: tuple[str, str]) -> str:
    """Why a round left a scan out, with its name."""
    case, reason = skipped
    return reason if reason.startswith((f"{case}:", f"{case}.")) else f"{case}: {reason}"


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
