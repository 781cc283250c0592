"""What a round has predicted and decided so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from aslseg.agreement.measures import Agreement
from aslseg.agreement.promise import Pair
from aslseg.agreement.promotion_rules import Verdict
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import PSEUDO
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.cross_fit import CrossFit
from aslseg.rounds.folds.evidence import Evidence, Floors
from aslseg.rounds.ledger.ledger import Event
from aslseg.rounds.promotion.canaries import Canary, Stop
from aslseg.rounds.promotion.promises import Promises
from aslseg.rounds.steps.artefacts import CachedProbabilities
from aslseg.rounds.steps.pipeline import RoundPipeline


@dataclass(frozen=True)
class CaseAssessment:
    """How far the two networks agree on a scan, and whether its mask may be promoted.

    Attributes:
        agreement: On all labels.
        verdict: On the mask.
        learned: Agreement on the labels that a promotion teaches; None where these are all.
    """

    agreement: Agreement
    verdict: Verdict
    learned: Agreement | None = None

    @property
    def of_learned(self) -> Agreement:
        """The agreement by which masks are chosen."""
        return self.learned or self.agreement


@dataclass
class RoundState:
    """What a round has predicted and decided so far.

    Attributes:
        pipeline: The round's cases and steps.
        models: The models before retraining.
        ssl_maps: Region probabilities of the SSL model.
        second_maps: Region probabilities of the network that the SSL model is compared with: the adaptation network,
            or CFR's canvas model.
        source: Whose masks are promoted, for the ledger.
        masks: Region probabilities of the source.
        evidence: What human labels say of the masks.
        floors: Which labels it allows to be promoted.
        assessments: By case id, of every scan without a human label.
        refused: Why scans are not promoted, by case id.
        promise: What the round promises of the promoted masks, for the summary.
        canaries: What the verdict says of the validation scans, and how good their masks are.
        stops: What may not be promoted, because a canary shows that it would be wrong.
        crossed: What the folds give; None without.
    """

    pipeline: RoundPipeline
    models: ModelSet
    ssl_maps: CachedProbabilities
    second_maps: CachedProbabilities
    source: str
    masks: CachedProbabilities
    evidence: Evidence = field(default_factory=Evidence)
    floors: Floors = field(default_factory=Floors)
    assessments: dict[str, CaseAssessment] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    promise: dict[str, dict[str, Any]] = field(default_factory=dict)
    canaries: list[Canary] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    crossed: CrossFit | None = None

    def against_every_mask(self, case: str) -> tuple[str, ...]:
        """What speaks against any mask of a scan, however well networks agree: floors, canaries, an alien scan."""
        unlike = self.pipeline.cases.unlike
        always = {
            *self.floors.blocking,
            *(stop.reason for stop in self.stops),
            *([unlike[case]] if case in unlike else []),
        }
        return tuple(reason for reason in self.assessments[case].verdict.reasons if reason in always)

    def barred(self, case: str) -> tuple[str, ...]:
        """Why the mask that was promoted before this round may not stand again, should its model be rejected.

        That is what speaks against every mask of the scan, and that the earlier one teaches a nested label that human
        labels no longer support. The latter says nothing of a new mask, which leaves that label open.
        """
        return (*self.against_every_mask(case), *self._no_longer_taught(case))

    def _no_longer_taught(self, case: str) -> list[str]:
        event = self._promoted_before.get(case)
        if event is None or event.kind != "mask":
            return []
        taught = [name for name in self.floors.unknown if name not in event.details.get("unknown", ())]
        return [f"it teaches {name} ({self.floors.reasons[name]})" for name in taught]

    @cached_property
    def _promoted_before(self) -> dict[str, Event]:
        return self.pipeline.ledger.masks(PSEUDO, before=self.pipeline.opened)

    @property
    def pairs(self) -> dict[str, list[Pair]]:
        """Agreement and Dice of human labels that the predicting network was not trained on, by label."""
        labels, unknown = self.pipeline.labels, self.floors.unknown
        parents = zip(labels.names, labels.parents, strict=True)
        around = {labels.names[parent] for name, parent in parents if parent is not None and name in unknown}
        return self.evidence.pairs(self.source, around)

    @cached_property
    def promises(self) -> Promises:
        """What can be promised of the masks; nothing of the labels that they leave open."""
        return Promises.of(self.pipeline.settings, self.pipeline.ledger, self.pairs, self.floors.unknown)

    def differs(self, case: Prepared) -> np.ndarray:
        """Where the two networks differ in what a promotion of the case teaches, (i, j, k) bool."""
        p, unknown = self.pipeline, self.floors.unknown
        first, second = (p.labels.merge(p.decode(maps(case)), unknown) for maps in (self.ssl_maps, self.second_maps))
        return np.asarray(first != second)
