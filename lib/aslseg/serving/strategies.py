"""The order in which scans are handed out: by the agreement that the last round wrote into the ledger."""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from aslseg.agreement.plausibility import WORTH_A_LOOK
from aslseg.cases.scan_checks import ScanChecks
from aslseg.errors import BadImageError
from aslseg.rounds.ledger.audits import AUDIT, CHECKED, waiting
from aslseg.rounds.ledger.ledger import Ledger

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30 * 60
REMEMBERED_SECONDS = 12 * 3600
"""How long it counts that somebody was given a scan and left it."""
AUDIT_EVENTS = (AUDIT, CHECKED, "rolled back", "note")
"""Events that change which audits wait."""
ANYBODY = {None, "", "user-xyz", "admin"}


class Leases:
    """Scans that were handed out to somebody, and to nobody else for half an hour.

    Args:
        seconds: Length of a lease.
        clock: Monotonic seconds.
    """

    def __init__(self, seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._held: dict[str, tuple[str, float]] = {}  # case to client and end of the lease
        self._given: dict[tuple[str, str], tuple[int, float]] = {}  # client and case to how often, and when last
        self._lock = threading.Lock()

    def take(self, ranked: Sequence[str], client: str, usable: Callable[[str], bool] | None = None) -> str | None:
        """The scan for ``client``, leased to them now; None where no scan is usable.

        Who asks again without saving wants another one, so the scans that ``client`` was given least often come first.
        Among these are first those that nobody else has, in the order of ``ranked``, and then those that somebody else
        was given longest ago: a second opinion is better than no work.

        Args:
            ranked: Ids of scans, the best first.
            client: Who asks.
            usable: Whether a scan can be handed out, asked of one after the other until one can; None: all can.
        """
        unusable: set[str] = set()
        while True:
            with self._lock:
                chosen = self._choose([c for c in ranked if c not in unusable] if unusable else ranked, client)
                if chosen is None:
                    return None
                before = self._held.get(chosen)
                self._held[chosen] = (client, self.clock() + self.seconds)
            # outside the lock: it may read the scan
            if usable is None or usable(chosen):
                self._count(client, chosen)
                return chosen
            unusable.add(chosen)
            with self._lock:
                self._held.pop(chosen, None)
                if before is not None:
                    self._held[chosen] = before

    def release(self, case: str) -> None:
        """The scan is done."""
        with self._lock:
            self._held.pop(case, None)

    def _choose(self, ranked: Sequence[str], client: str) -> str | None:
        now = self.clock()
        self._held = {c: h for c, h in self._held.items() if h[1] > now}
        self._given = {key: g for key, g in self._given.items() if g[1] > now - REMEMBERED_SECONDS}
        given = {case: times for (who, case), (times, _) in self._given.items() if who == client}
        others = {c: end for c, (who, end) in self._held.items() if who != client}
        # of thousands of scans, only those that somebody was given are in the way of the first
        new = next((case for case in ranked if case not in given and case not in others), None)
        return new or min(ranked, key=lambda case: (given.get(case, 0), others.get(case, 0.0)), default=None)

    def _count(self, client: str, case: str) -> None:
        with self._lock:
            times, _ = self._given.get((client, case), (0, 0.0))
            self._given[client, case] = times + 1, self.clock()


class HandsOut(Strategy):
    """Hands out scans that have no human label and can be read.

    Args:
        leases: Shared by all strategies.
        checks: Shared too: what reading a scan gave.
        description: Shown to annotators.
    """

    def __init__(self, leases: Leases, checks: ScanChecks, description: str) -> None:
        super().__init__(description)
        self.leases, self.checks = leases, checks

    @abstractmethod
    def ranked(self, cases: list[str]) -> tuple[list[str], Callable[[str], dict[str, Any]]]:
        """The cases in the order in which they are handed out, and a function that says why one of them was chosen.

        Args:
            cases: The datastore's own list, which stays the same one as long as its content does; it is not changed.
        """

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """``{"id", "reason", ...}``, or nothing when every scan that can be read has a human label."""
        ranked, reason = self.ranked(datastore.get_unlabeled_images())
        chosen = self.leases.take(ranked, client_of(request), lambda case: self._readable(case, datastore))
        return {"id": chosen, **reason(chosen)} if chosen else {}

    def _readable(self, case: str, datastore: Datastore) -> bool:
        try:
            return self.checks.read(Path(datastore.get_image_uri(case))).error is None
        except BadImageError as error:  # a series of a PACS that is no volume
            logger.warning("%s is not handed out: %s", case, error)
            return False


@dataclass(frozen=True)
class Scored:
    """All scans with an agreement, in its order.

    Attributes:
        version: The ledger's last event about scores.
        agreement: By id, the scan that comes first at the beginning.
    """

    version: int
    agreement: dict[str, float]

    @classmethod
    def of(cls, version: int, agreements: dict[str, float], highest: bool) -> Scored:
        """Sort."""
        order = sorted(agreements, key=lambda case: (agreements[case], case), reverse=highest)
        return cls(version, {case: agreements[case] for case in order})


@dataclass(frozen=True)
class Order:
    """Scans without a human label in the order of their agreement.

    Attributes:
        cases: As the datastore gave them.
        scored: What they were sorted by.
        ranked: Ids; those without a score come last.
        count: How many of them have a score.
    """

    cases: list[str]
    scored: Scored
    ranked: list[str]
    count: int

    @classmethod
    def of(cls, cases: list[str], scored: Scored) -> Order:
        """Take these cases out of the order of all; whenever a label was saved, so nothing is sorted."""
        wanted, agreement = set(cases), scored.agreement
        known = [case for case in agreement if case in wanted]
        rest = [case for case in cases if case not in agreement] if len(known) < len(cases) else []
        return cls(cases, scored, known + sorted(rest), len(known))


class ByAgreement(HandsOut):
    """Scans without a human label, ordered by agreement.

    Args:
        ledger: Scores.
        leases, checks, description: As for :class:`HandsOut`.
        highest: Highest agreement first instead of lowest.
    """

    def __init__(self, ledger: Ledger, leases: Leases, checks: ScanChecks, highest: bool, description: str) -> None:
        super().__init__(leases, checks, description)
        self.ledger, self.highest = ledger, highest
        self._order: Order | None = None

    def ranked(self, cases: list[str]) -> tuple[list[str], Callable[[str], dict[str, Any]]]:
        """By agreement, then those that are not scored yet; with ``rank`` and ``agreement`` in the reason."""
        order = self._current(cases)

        def reason(case: str) -> dict[str, Any]:
            rank = order.ranked.index(case) + 1
            return {"rank": rank, **_reason(order.scored.agreement.get(case), rank, order.count, self.highest)}

        return order.ranked, reason

    def _current(self, cases: list[str]) -> Order:
        """The order, sorted again only when there are other scores."""
        order, version = self._order, self.ledger.last_seq(("scored",))
        scored = order.scored if order is not None else None
        if scored is None or scored.version != version:
            scored = Scored.of(version, self.ledger.agreements(), self.highest)
        if order is None or order.cases is not cases or order.scored is not scored:
            order = self._order = Order.of(cases, scored)
        return order


class ByAudit(ByAgreement):
    """Scans that were drawn as audits and wait for a label, oldest first; then masks that would be promoted although
    they are unlike the human labels in shape or place; then the lowest agreement first.

    Args:
        ledger: Audits and scores.
        leases, checks, description: As for :class:`HandsOut`.
    """

    def __init__(self, ledger: Ledger, leases: Leases, checks: ScanChecks, description: str) -> None:
        super().__init__(ledger, leases, checks, False, description)
        self._drawn: tuple[int, dict[str, int]] = (-1, {})
        self._flags: tuple[int, dict[str, str]] = (-1, {})

    def ranked(self, cases: list[str]) -> tuple[list[str], Callable[[str], dict[str, Any]]]:
        """Audits that wait, then unusual masks, then as by agreement; the reason says which of these it is."""
        others, why = super().ranked(cases)
        rounds, unusual, left = self._waiting(), self._unusual(), set(cases)
        drawn = [case for case in rounds if case in left]
        looked = [case for case in unusual if case in left and case not in rounds]

        def reason(case: str) -> dict[str, Any]:
            about = why(case) | {"audit": rounds.get(case)}
            if case in rounds:
                text = f"audit, {drawn.index(case) + 1} of {len(drawn)}: drawn at random after round {rounds[case]}"
                return about | {"reason": f"{text}; correct it as far as you would any other"}
            found = unusual.get(case)
            return about | {"reason": f"no audit waits; {found or about['reason']}"}

        first = set(drawn) | set(looked)
        return [*drawn, *looked, *(case for case in others if case not in first)] if first else others, reason

    def _unusual(self) -> dict[str, str]:
        """Scan to what is unusual about its mask, lowest agreement first; read again when there are other scores."""
        version = self.ledger.last_seq(("scored",))
        if version != self._flags[0]:
            good = [score for score in self.ledger.scores() if score.details.get("promote")]
            flags = {s.case: [f for f in s.details.get("flags", ()) if f.endswith(WORTH_A_LOOK)] for s in good}
            self._flags = version, {case: "; ".join(found) for case, found in flags.items() if found}
        return self._flags[1]

    def _waiting(self) -> dict[str, int]:
        """Scan to the round of its oldest audit that waits; read again only when the ledger has other audits."""
        version = self.ledger.last_seq(AUDIT_EVENTS)
        if version != self._drawn[0]:
            rounds: dict[str, int] = {}
            for audit in waiting(self.ledger):
                rounds.setdefault(audit.case, audit.round)
            self._drawn = version, rounds
        return self._drawn[1]


class Random(HandsOut):
    """Any scan without a human label.

    Args:
        leases, checks: As for :class:`HandsOut`.
        generator: Source of the choice.
    """

    def __init__(self, leases: Leases, checks: ScanChecks, generator: np.random.Generator) -> None:
        super().__init__(leases, checks, "Any scan without a human label")
        self.generator = generator

    def ranked(self, cases: list[str]) -> tuple[list[str], Callable[[str], dict[str, Any]]]:
        """In an order that is drawn anew for each request."""
        shuffled = [cases[n] for n in self.generator.permutation(len(cases))]
        return shuffled, lambda _: {"reason": "chosen at random"}


def client_of(request: Mapping[str, Any]) -> str:
    """Who asks. Slicer's default name may be anybody, so that each call with it counts as another person."""
    name = request.get("client_id")
    return str(name)[:128] if name not in ANYBODY else f"anybody-{time.monotonic_ns()}"


def _reason(agreement: float | None, rank: int, scored: int, highest: bool) -> dict[str, Any]:
    if agreement is None:
        return {"agreement": None, "reason": "not scored yet; run a round"}
    which = "highest" if highest else "lowest"
    use = "quick to confirm" if highest else "a human helps most here"
    text = f"{which} agreement, {rank} of {scored} ({agreement:.3f}): {use}"
    return {"agreement": round(agreement, 4), "reason": text}
