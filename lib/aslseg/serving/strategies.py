"""The order in which scans are handed out: by the agreement that the last round wrote into the ledger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from aslseg.rounds.ledger import Ledger, Score

LEASE_SECONDS = 30 * 60
ANYBODY = {None, "", "user-xyz", "admin"}


class Leases:
    """Scans that were handed out to somebody, and to nobody else for half an hour.

    Args:
        seconds: Length of a lease.
        clock: Monotonic seconds.
    """

    def __init__(self, seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._held: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def take(self, ranked: list[str], client: str) -> str | None:
        """The first scan that nobody else has, leased to ``client`` now; a scan that it has already comes first.

        Where all are held, the first of all: a second opinion is better than no work.
        """
        with self._lock:
            now = self.clock()
            self._held = {c: h for c, h in self._held.items() if h[1] > now}
            free = [c for c in ranked if self._held.get(c, (client, 0))[0] == client]
            chosen = next(iter(free), None) or next(iter(ranked), None)
            if chosen is not None:
                self._held[chosen] = (client, now + self.seconds)
            return chosen

    def release(self, case: str) -> None:
        """The scan is done."""
        with self._lock:
            self._held.pop(case, None)


class ByAgreement(Strategy):
    """Scans without a human label, ordered by agreement.

    Args:
        ledger: Scores.
        leases: Shared by all strategies.
        highest: Highest agreement first instead of lowest.
        description: Shown to annotators.
    """

    def __init__(self, ledger: Ledger, leases: Leases, highest: bool, description: str) -> None:
        super().__init__(description)
        self.ledger, self.leases, self.highest = ledger, leases, highest

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """``{"id", "agreement", "reason", "rank"}``, or nothing when every scan has a human label."""
        scores = {s.case: s for s in self.ledger.scores()}
        open_cases = sorted(datastore.get_unlabeled_images())
        scored = sorted((c for c in open_cases if c in scores), key=lambda c: (scores[c].agreement, c))
        if self.highest:
            scored.reverse()
        ranked = scored + [c for c in open_cases if c not in scores]
        chosen = self.leases.take(ranked, client_of(request))
        if chosen is None:
            return {}
        rank = ranked.index(chosen) + 1
        return {"id": chosen, "rank": rank, **_reason(scores.get(chosen), rank, len(scored), self.highest)}


class Random(Strategy):
    """Any scan without a human label.

    Args:
        leases: Shared by all strategies.
        generator: Source of the choice.
    """

    def __init__(self, leases: Leases, generator: np.random.Generator) -> None:
        super().__init__("Any scan without a human label")
        self.leases, self.generator = leases, generator

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """``{"id", "reason"}``, or nothing when every scan has a human label."""
        ranked = sorted(datastore.get_unlabeled_images())
        self.generator.shuffle(ranked)
        chosen = self.leases.take(ranked, client_of(request))
        return {"id": chosen, "reason": "chosen at random"} if chosen else {}


def client_of(request: Mapping[str, Any]) -> str:
    """Who asks. Slicer's default name may be anybody, so that each call with it counts as another person."""
    name = request.get("client_id")
    return str(name)[:128] if name not in ANYBODY else f"anybody-{time.monotonic_ns()}"


def _reason(score: Score | None, rank: int, scored: int, highest: bool) -> dict[str, Any]:
    if score is None:
        return {"agreement": None, "reason": "not scored yet; run a round"}
    which = "highest" if highest else "lowest"
    use = "quick to confirm" if highest else "a human helps most here"
    text = f"{which} agreement, {rank} of {scored} ({score.agreement:.3f}): {use}"
    return {"agreement": round(score.agreement, 4), "reason": text}
