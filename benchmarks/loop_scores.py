"""What bench_loop.py says of masks; but for arms that learn true labels, nothing else reads those of other scans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aslseg.agreement.measures import Agreement
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.types import Labels
from lits_scoring import row_of
from loop_data import ScanSet


class Scores:
    """Scores against the truth of a labelled set's scans.

    Args:
        scans: Of the set.
        labels: Of the class maps.
    """

    def __init__(self, scans: ScanSet, labels: Labels) -> None:
        self.scans, self.labels = scans, labels

    def by_label(self, mask: np.ndarray, case: Prepared) -> dict[str, float]:
        """Dice of a class map (i, j, k) of each label that the truth holds, with all that lies in it."""
        pairs = zip(self.labels.names, *map(self.labels.regions, (mask, self.scans.truth(case.id))), strict=True)
        return {name: dice(found, true) or 0.0 for name, found, true in pairs if true.any()}

    def score(self, mask: np.ndarray, case: Prepared) -> float:
        """Mean of :meth:`by_label`; 0 where the truth is empty, which no scan's is."""
        return _mean(self.by_label(mask, case))

    def mean(self, masks: Mapping[str, np.ndarray], cases: Iterable[Prepared]) -> float | None:
        """Mean :meth:`score` of those of some scans that have a mask; None without any."""
        found = {c.id: self.score(masks[c.id], c) for c in cases if c.id in masks}
        return _mean(found) if found else None

    def of_scored(self, masks: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Dice of each scored scan and, of livers, a row for each with its lesions."""
        found: dict[str, Any] = {"dice": {c.id: self.score(masks[c.id], c) for c in self.scans.scored}}
        if len(self.labels) > 1:
            found["rows"] = [row_of(c, masks[c.id], self.scans.truth(c.id)) for c in self.scans.scored]
        return found

    def of_learned(
        self,
        masks: Iterable[tuple[Prepared, np.ndarray]],
        learned: Sequence[str],
        agreements: Mapping[str, Agreement],
    ) -> dict[str, Any]:
        """Dice of all masks that an arm could learn and of those that it has learned, and agreement.

        Args:
            masks: The unlabelled scans, each with its class map.
            learned: Ids of those whose mask is learned.
            agreements: Of the masks by which these were chosen, by id; empty: all are learned.

        Returns:
            ``masks``, ``learned`` and ``agreement`` by id, as means over the labels; ``by_label`` has the same of each.
        """
        found = {case.id: self.by_label(mask, case) for case, mask in masks}
        means = {case: _mean(values) for case, values in found.items()}
        by_label = {}
        for label in self.labels.names:
            known = {case: agreed.per_label[label] for case, agreed in agreements.items()}
            by_label[label] = {
                "masks": {case: values[label] for case, values in found.items() if label in values},
                "learned": {case: found[case][label] for case in learned if label in found[case]},
                "agreement": {case: value for case, value in known.items() if value is not None},
            }
        return {
            "masks": means,
            "learned": {case: means[case] for case in learned},
            "agreement": {case: agreed.mean for case, agreed in agreements.items()},
            "by_label": by_label,
        }


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values()))) if values else 0.0
