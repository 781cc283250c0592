"""Draws the audits of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aslseg.agreement.promotion_rules import without_thresholds
from aslseg.cases.studies import PSEUDO
from aslseg.rounds.label_files.masks import human_labels
from aslseg.rounds.ledger.audits import AUDIT, GONE, waiting
from aslseg.rounds.ledger.ledger import Entry

if TYPE_CHECKING:
    from aslseg.rounds.promotion.state import RoundState
    from aslseg.rounds.steps.pipeline import RoundPipeline

CLOSEST = 10
"""Scans of which some are audited where too few are promoted."""


def closest(state: RoundState) -> list[str]:
    """Scans that an audit may be drawn from where too few are promoted: of those that nothing but their agreement
    speaks against, the ten on which the networks agree best."""
    found = {}
    for case in state.pipeline.cases.unlabelled:
        about = state.assessments[case.id]
        agreement = about.of_learned
        if without_thresholds(about.verdict, agreement, state.pipeline.settings.thresholds).promote:
            found[case.id] = (len(agreement.empty), -agreement.mean)
    return sorted(found, key=lambda case: (found[case], case))[:CLOSEST]


def draw_audits(pipeline: RoundPipeline, spare: Sequence[str], about: Callable[[str], dict[str, Any]]) -> list[str]:
    """Draw the audits of a round at random among the promoted scans, once, whatever is killed and resumed.

    Scans whose earlier audit waits for an answer are not drawn again, unless the scan was replaced since; the audit is
    over then.

    Args:
        pipeline: The round, whose promotions are settled; the seed is the setting's and the round's number.
        spare: Scans that are drawn where fewer are promoted: those that came closest.
        about: What the ledger says of the mask of one of these, as of a promotion.

    Returns:
        The scans that were drawn now.
    """
    ledger, number, root = pipeline.ledger, pipeline.number, pipeline.paths.studies
    most = pipeline.settings.audits
    if not most or number is None or root is None or ledger.events(kinds=(AUDIT,), number=number):
        return []
    images = {c.id: c.image_hash for c in pipeline.cases.unlabelled}
    human, left = human_labels(root), waiting(ledger)
    gone = [a for a in left if a.case not in human and a.image != images.get(a.case)]
    taken = human | {a.case for a in left if a not in gone}
    promoted = {
        case: event.details
        for case, event in ledger.masks(PSEUDO).items()
        if event.kind == "mask" and case not in taken and event.details.get("image", "") == images.get(case)
    }
    generator = np.random.default_rng([pipeline.settings.seed, number])
    drawn = _some(generator, sorted(promoted), most)
    others = _some(generator, [c for c in spare if c not in promoted and c not in taken], most - len(drawn))
    why = [{"why": GONE, "mask": a.mask, "image": a.image} for a in gone]
    entries = [Entry("note", number, a.case, PSEUDO, about_it) for a, about_it in zip(gone, why, strict=True)]
    for case in [*drawn, *others]:
        details = promoted[case] if case in promoted else about(case)
        kept = {name: details[name] for name in ("sha256", "image", "agreement")}
        entries.append(Entry(AUDIT, number, case, PSEUDO, kept | {"promoted": case in promoted}))
    ledger.append(entries)
    return [*drawn, *others]


def _some(generator: np.random.Generator, cases: Sequence[str], most: int) -> list[str]:
    count = max(min(most, len(cases)), 0)
    return [cases[n] for n in sorted(generator.choice(len(cases), count, replace=False))] if count else []
