"""What a round has predicted and decided so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from aslseg.agreement.measures import Agreement
from aslseg.agreement.promise import Pair
from aslseg.agreement.promotion_rules import Verdict
from aslseg.models.model_set import ModelSet
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.canaries import Canary, Stop
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.rounds.promises import Promises


@dataclass(frozen=True)
class CaseAssessment:
    """How far the two networks agree on a scan, and whether its mask may be promoted."""

    agreement: Agreement
    verdict: Verdict


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
        assessments: By case id, of every scan without a human label.
        refused: Why scans are not promoted, by case id.
        pairs: Agreement and Dice of human labels that the predicting network was not trained on, by label.
        promise: What the round promises of the promoted masks, for the summary.
        canaries: What the verdict says of the validation scans, and how good their masks are.
        stops: What may not be promoted, because a canary shows that it would be wrong.
    """

    pipeline: RoundPipeline
    models: ModelSet
    ssl_maps: CachedProbabilities
    second_maps: CachedProbabilities
    source: str
    masks: CachedProbabilities
    assessments: dict[str, CaseAssessment] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    promise: dict[str, dict[str, Any]] = field(default_factory=dict)
    canaries: list[Canary] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)

    @cached_property
    def promises(self) -> Promises:
        """What can be promised of the masks."""
        return Promises.of(self.pipeline.settings, self.pipeline.ledger, self.pairs)
