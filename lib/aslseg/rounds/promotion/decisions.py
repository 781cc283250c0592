"""What a round decided on each scan and why, kept with the round's summary. Imports no torch.

``aslseg ledger list``, ``aslseg report`` and the page of a studies folder show it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aslseg.rounds.ledger.ledger import RoundRow, Score

if TYPE_CHECKING:
    from aslseg.rounds.promotion.state import RoundState

VALIDATES = "its patient validates models and is never trained on"
WITHDRAWN = "withdrawn, because the model that was retrained with it is not published"
NOT_KEPT = "the reasons of this round were not kept (it is of an earlier version)"
# measured numbers differ from scan to scan; what is left is counted
KINDS = (
    (re.compile(r"agreement \S+ below"), "agreement below"),
    (re.compile(r"volume .* ml outside .*"), "volume unlike human labels"),
    (re.compile(r"\d+ pieces, more than \d+"), "more pieces than human labels"),
    (re.compile(r"canary .*: (\S+) would have been promoted.*"), r"\1 of a validation scan would be promoted wrongly"),
    (re.compile(r"the scan is unlike every labelled one.*"), "the scan is unlike the labelled ones"),
    (re.compile(r"the scan seems to have (.*) exchanged.*"), r"the scan seems to have \1 exchanged"),
    (re.compile(r"the scan's field of view is .*"), "another field of view than labelled scans"),
    (re.compile(r"passed, but \d+ scans agree better"), "passed, but others agree better"),
    (re.compile(r"holds for (\d+ scans? only|no scan) \(promote_target\)"), "would not hold with it"),
)


@dataclass(frozen=True)
class Decision:
    """What a round decided on a scan without a human label.

    Attributes:
        case: Id of the scan.
        agreement: Mean of the two networks' agreement over the labels (Dice).
        per_label: Agreement by label; None where both networks find nothing. Empty where it was not kept.
        promoted: Whether its mask is trained on.
        reasons: Everything that speaks against its mask.
        flags: What a person should know of the mask beside that.
    """

    case: str
    agreement: float
    per_label: dict[str, float | None]
    promoted: bool
    reasons: tuple[str, ...]
    flags: tuple[str, ...] = ()


def decide(state: RoundState, promoted: Collection[str], withdrawn: Collection[str]) -> dict[str, dict[str, Any]]:
    """The decisions of a round by case id, for its summary.

    Args:
        state: The round, at its end.
        promoted: Cases whose masks are trained on.
        withdrawn: Cases whose promotion was taken back because the retrained model is not published.
    """
    found = {}
    for case, assessment in sorted(state.assessments.items()):
        reasons = list(assessment.verdict.reasons)
        if case not in promoted:
            reasons = _against(state, case, reasons, withdrawn)
        found[case] = {
            "agreement": assessment.agreement.mean,
            "per_label": assessment.agreement.per_label,
            "promoted": case in promoted,
            "reasons": reasons,
            "flags": [*assessment.verdict.flags, *(state.floors.notes if case in promoted else ())],
        }
    return found


def _against(state: RoundState, case: str, reasons: list[str], withdrawn: Collection[str]) -> list[str]:
    """Why a case is not promoted."""
    if case in state.pipeline.dropped:
        return [state.pipeline.dropped[case]]
    if case in withdrawn:
        return [WITHDRAWN]
    if any(c.id == case for c in state.pipeline.cases.predict_only):
        return [*reasons, VALIDATES]
    return state.refused.get(case, reasons)


def decisions_of(row: RoundRow, scores: Iterable[Score] = ()) -> list[Decision]:
    """The decisions of a round that has ended, lowest agreement first.

    Args:
        row: The round. Rounds of earlier versions kept no reasons.
        scores: The last ranking, which has the reasons of the round that made it.
    """
    promoted = set(row.summary.get("promoted", ()))
    kept = row.summary.get("decisions")
    if kept is None:
        known = {s.case: s.details for s in scores if s.round == row.number}
        kept = {
            case: {
                "agreement": mean,
                "per_label": known.get(case, {}).get("per_label", {}),
                "promoted": case in promoted,
                "reasons": known.get(case, {}).get("reasons") or ([] if case in promoted else [NOT_KEPT]),
            }
            for case, mean in row.summary.get("agreement", {}).items()
        }
    found = [
        # rounds of earlier versions kept no flags
        Decision(case, **{**about, **{name: tuple(about.get(name, ())) for name in ("reasons", "flags")}})
        for case, about in kept.items()
    ]
    return sorted(found, key=lambda d: (d.agreement, d.case))


def count_reasons(decisions: Iterable[Decision]) -> list[tuple[str, int]]:
    """Why scans were not promoted: each kind of reason with the number of scans, the most frequent first."""
    counts = Counter(kind for d in decisions if not d.promoted for kind in {_kind(r) for r in d.reasons})
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def why_nothing(row: RoundRow, scores: Iterable[Score] = (), most: int = 3) -> str:
    """Why a round that has ended promoted nothing, in a line; empty where it did, or where it has not ended."""
    if not row.closed or row.summary.get("promoted"):
        return ""
    decisions = decisions_of(row, scores)
    if not decisions:
        return "there was no scan without a human label"
    counts = count_reasons(decisions)
    return "; ".join(_counted(counts[:most])) + (f"; {len(counts) - most} more reasons" if len(counts) > most else "")


def _counted(counts: Sequence[tuple[str, int]]) -> list[str]:
    return [f"{kind} ({count} scan{'s' if count > 1 else ''})" for kind, count in counts]


def _kind(reason: str) -> str:
    for pattern, kind in KINDS:
        reason = pattern.sub(kind, reason)
    return reason
