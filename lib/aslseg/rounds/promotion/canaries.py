"""Canaries: validation scans go through the verdict like unlabelled ones, and human labels say whether it was right.

A mask passes every rule where both networks make the same error. If that happens on a scan whose truth is known, it
happens on others too: no mask of that label is promoted in this round. Canaries are never trained on, nor promoted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aslseg.agreement.promotion_rules import Verdict
from aslseg.compute.overlap import dice
from aslseg.settings import Settings
from aslseg.types import Labels

if TYPE_CHECKING:
    from aslseg.cases.prepared_case import Prepared
    from aslseg.rounds.promotion.state import CaseAssessment
    from aslseg.rounds.steps.pipeline import RoundPipeline

logger = logging.getLogger(__name__)

FLOOR = 0.5
"""True Dice of a label below which its promotion would have been wrong."""


@dataclass(frozen=True)
class Canary:
    """A validation scan and what the verdict said of its machine mask.

    Attributes:
        case: Id of the scan.
        verdict: As for an unlabelled scan.
        dice: True Dice by label; None where machine and human leave the label empty.
        drawn: The labels that the machine mask holds.
    """

    case: str
    verdict: Verdict
    dice: dict[str, float | None]
    drawn: frozenset[str]


@dataclass(frozen=True)
class Stop:
    """Masks of a label that are not promoted in this round.

    Attributes:
        label: The label.
        drawn: The machine drew it wrongly: masks that hold it are stopped. Else it missed it altogether: masks without
            it are stopped.
        reason: In words.
    """

    label: str
    drawn: bool
    reason: str


def floors(settings: Settings) -> dict[str, float]:
    """Least true Dice of each label that a single canary may have.

    It is lower than ``promote_floor``, which is asked of a mean: one scan of many may be worse than that.
    """
    return dict.fromkeys(settings.label_set.names, FLOOR)


def watch(
    pipeline: RoundPipeline,
    assess: Callable[[Prepared, bool], tuple[CaseAssessment, np.ndarray]],
    unknown: Collection[str] = (),
) -> tuple[list[Canary], list[Stop]]:
    """Let a round's validation scans go through the verdict; a stop is a warning of the round, too.

    Args:
        pipeline: The round.
        assess: A case, and whether the promise may decide in place of a fixed agreement, to its assessment and its
            machine mask (i, j, k) on the working grid. The promise bounds the mean of the masks that agree best and
            says nothing of a single one, so that a canary keeps the fixed agreement.
        unknown: Labels that no promotion teaches; the masks do not hold them.
    """
    found = []
    for case in pipeline.cases.validation:
        assessed, mask = assess(case, False)
        truth = pipeline.labels.merge(np.asarray(case.label), unknown)
        found.append(canary(case.id, assessed.verdict, mask, truth, pipeline.labels))
    stops = find_stops(found, floors(pipeline.settings))
    pipeline.cases.warnings += [stop.reason for stop in stops]
    return found, stops


def canary(case: str, verdict: Verdict, mask: np.ndarray, truth: np.ndarray, labels: Labels) -> Canary:
    """Score one validation scan.

    Args:
        case: Its id.
        verdict: On its machine mask.
        mask, truth: Class maps (i, j, k) on the same grid.
        labels: The labels.
    """
    scored, drawn = {}, set()
    for name, found, true in zip(labels.names, labels.regions(mask), labels.regions(truth), strict=True):
        scored[name] = dice(found, true)
        if found.any():
            drawn.add(name)
    return Canary(case, verdict, scored, frozenset(drawn))


def find_stops(canaries: Iterable[Canary], least: Mapping[str, float]) -> list[Stop]:
    """What may not be promoted because a canary passed the verdict with a worse Dice than ``least``, by label."""
    stops = []
    for found in canaries:
        for name, value in found.dice.items() if found.verdict.promote else ():
            # written so that NaN stops
            if value is not None and not value >= least[name]:
                drawn = name in found.drawn
                what = f"{name} would have been promoted with Dice {value:.2f}"
                what += "" if drawn else " (the networks agree that there is none)"
                why = f"canary {found.case}: {what}, floor {least[name]:g}; or its human label is wrong"
                stops.append(Stop(name, drawn, why))
    for stop in stops:
        logger.warning("%s", stop.reason)
    return stops


def stopped(verdict: Verdict, mask: np.ndarray, labels: Labels, stops: Sequence[Stop]) -> Verdict:
    """The verdict on a mask (i, j, k), with the stops that concern it among the reasons."""
    return verdict.against(*(stop.reason for stop in concerning(mask, labels, stops)))


def concerning(mask: np.ndarray, labels: Labels, stops: Sequence[Stop]) -> list[Stop]:
    """The stops that concern a mask (i, j, k): of labels that it holds, or of labels that it lacks."""
    held = {n for n, m in zip(labels.names, labels.regions(mask), strict=True) if m.any()} if stops else set()
    return [stop for stop in stops if (stop.label in held) == stop.drawn]


def summarise(canaries: Sequence[Canary], stops: Sequence[Stop]) -> dict[str, Any]:
    """For the summary of a round: ``cases`` (verdict and true Dice of each), ``passed`` (their number), ``stops``."""
    return {
        "cases": {
            c.case: {"passed": c.verdict.promote, "dice": c.dice, "reasons": list(c.verdict.reasons)} for c in canaries
        },
        "passed": sum(c.verdict.promote for c in canaries),
        "stops": [s.reason for s in stops],
    }


def in_words(found: dict[str, Any]) -> str:
    """A sentence on what :func:`summarise` gave; empty without canaries."""
    asked, passed, wrong = len(found.get("cases", ())), found.get("passed", 0), len(found.get("stops", ()))
    if not asked:
        return ""
    text = f"{asked} validation {'scan' if asked == 1 else 'scans'} went through the same verdict: "
    text += f"{passed} would have been promoted"
    return text + (f", {wrong} {'label' if wrong == 1 else 'labels'} of these wrongly." if passed else ".")
