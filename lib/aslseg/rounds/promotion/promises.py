"""The promise of a round: how many masks may be promoted so that their mean Dice reaches what is asked of each label.

The bound and its equations are in :mod:`aslseg.agreement.promise`. A label for which it does not exist yet keeps its
fixed threshold of agreement.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aslseg.agreement.promise import DiceLine, Pair, correlation, fit_line, missing_audits
from aslseg.rounds.ledger.audits import audited_pairs
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.settings import Settings

Masks = Sequence[Mapping[str, float | None]]
"""Agreement by label of masks in the order in which they would be promoted; None where both networks find nothing."""


@dataclass(frozen=True)
class Promises:
    """What is asked of each label, and what is known of it.

    Attributes:
        targets: Mean Dice of the promoted masks that is asked, by label; labels of which nothing is asked are left out.
        confidence: Setting ``promote_confidence``.
        pairs: Of agreement and true Dice, by label.
        lines: By label for which the bound exists.
    """

    targets: dict[str, float]
    confidence: float
    pairs: dict[str, list[Pair]]
    lines: dict[str, DiceLine]

    @classmethod
    def of(
        cls,
        settings: Settings,
        ledger: Ledger,
        crossed: Mapping[str, Sequence[Pair]],
        left_open: Collection[str] = (),
    ) -> Promises:
        """From the audits in the ledger and the pairs of human labels that were not trained on.

        Args:
            settings: ``labels``, ``nested``, ``promote_target``, ``promote_confidence``.
            ledger: With the audits.
            crossed: Pairs by label. That of a scan that was audited is left out: it is no further evidence.
            left_open: Labels that promoted masks do not teach, so that nothing is asked of them.
        """
        targets = {n: target for n, target in settings.targets.items() if target > 0 and n not in left_open}
        pairs = audited_pairs(ledger, targets)
        for name, audited in pairs.items():
            known = {p.case for p in audited}
            pairs[name] = [*(p for p in crossed.get(name, ()) if p.case not in known), *audited]
        fitted = {name: fit_line(found) for name, found in pairs.items()}
        lines = {name: line for name, line in fitted.items() if line is not None}
        return cls(targets, settings.promote_confidence, pairs, lines)

    def largest(self, masks: Masks) -> int:
        """The largest number of masks, from the first one on, of which every label reaches its target.

        Scans that do not hold a label do not count for it.
        """
        holds = np.ones(len(masks), bool)
        for name in self.lines:
            holds &= self._bounds(name, masks) >= self.targets[name]
        return int(np.flatnonzero(holds)[-1]) + 1 if holds.any() else 0

    def about(self, masks: Masks, promoted: int) -> dict[str, dict[str, Any]]:
        """For the summary of a round, by label.

        Args:
            masks: As for :meth:`largest`.
            promoted: How many of them are promoted.

        Returns:
            ``made``, ``target``, ``confidence``, ``bound`` (of the promoted masks or, where none is, the highest; None
            where there is none), ``k`` (promoted scans that hold the label), ``audits``, ``pairs``, ``r`` (their
            correlation), ``missing`` (audits, at least).
        """
        found = {}
        for name, target in self.targets.items():
            pairs, bounds = self.pairs[name], self._bounds(name, masks)
            count = sum(m.get(name) is not None for m in masks[:promoted])
            finite = bounds[np.isfinite(bounds)]
            bound = float(bounds[promoted - 1]) if count else float(finite.max()) if len(finite) else None
            made = name in self.lines and count > 0
            found[name] = {
                "made": made,
                "target": target,
                "confidence": self.confidence,
                "bound": bound if name in self.lines else None,
                "k": count,
                "audits": sum(p.audited for p in pairs),
                "pairs": len(pairs),
                "r": correlation(pairs),
                "missing": 0 if name in self.lines else max(missing_audits(pairs), 1),
            }
        return found

    def refusal(self, promoted: int) -> str:
        """Why a mask that passed is not among the promoted ones."""
        asked = ", ".join(f"{name} {self.targets[name]:g}" for name in self.lines)
        scans = f"{promoted} scan{'' if promoted == 1 else 's'} only" if promoted else "no scan"
        return f"passed, but the promise (mean Dice {asked}) holds for {scans} (promote_target)"

    def _bounds(self, name: str, masks: Masks) -> np.ndarray:
        """(n,) lower bound of a label's mean Dice over the first 1 to n masks; infinite while none holds it."""
        values = [m.get(name) for m in masks]
        held = np.cumsum([v is not None for v in values])
        if name not in self.lines or not len(masks) or not held[-1]:
            return np.full(len(masks), np.inf)
        bounds = self.lines[name].lower_bounds([v for v in values if v is not None], self.confidence)
        return np.where(held > 0, bounds[np.maximum(held - 1, 0)], np.inf)


def withdrawn(promise: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """:meth:`Promises.about` of a round whose promotions were withdrawn."""
    return {name: {**about, "made": False, "withdrawn": True} for name, about in promise.items()}
