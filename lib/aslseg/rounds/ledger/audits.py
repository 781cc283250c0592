"""Audits: promoted scans that are drawn at random for a person to label, so that somebody knows how good masks are.

What is drawn stands in the ledger before anybody sees it, with the mask and its agreement. The first label that a
person saves for such a scan answers it (:mod:`aslseg.rounds.feedback.corrections`), whoever chose the scan. Imports
no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aslseg.agreement.promise import Pair
from aslseg.rounds.ledger.events import RoundRow
from aslseg.rounds.ledger.ledger import Ledger

AUDIT, CHECKED = "audit", "checked"
"""Kinds of events: a scan was drawn; the Dice of its mask and the label that a person saved."""
GONE = "the audit is over: its scan was deleted or replaced"


@dataclass(frozen=True)
class Audit:
    """A scan that was drawn.

    Attributes:
        case: The scan.
        round: After which round it was drawn.
        mask, image: Hashes of the mask that is audited and of the scan.
        agreement: Of the two networks, by label; None where both found nothing.
        promoted: Whether the mask was promoted; where too few are, one that came close is drawn.
        dice: Of mask and human label, by label; None without an answer.
    """

    case: str
    round: int
    mask: str
    image: str
    agreement: dict[str, float | None]
    promoted: bool
    dice: dict[str, float | None] | None


def audits(ledger: Ledger) -> list[Audit]:
    """All audits, oldest first; the last label that a person saved counts."""
    checked = {(e.case, e.details["mask"]): e.details["dice"] for e in ledger.events(kinds=(CHECKED,))}
    found = []
    for event in ledger.events(kinds=(AUDIT,)):
        d, case = event.details, event.case or ""
        answer = checked.get((case, d["sha256"]))
        found.append(
            Audit(case, event.round or 0, d["sha256"], d["image"], d["agreement"], bool(d["promoted"]), answer)
        )
    return found


def waiting(ledger: Ledger) -> list[Audit]:
    """Audits without an answer, oldest first; after a rollback, or without its scan, an audit is over."""
    undone = {e.round for e in ledger.events(kinds=("rolled back",))}
    notes = [e for e in ledger.events(kinds=("note",)) if {"mask", "image"} <= e.details.keys()]
    over = {(e.case, e.details["mask"], e.details["image"]) for e in notes}
    left = [a for a in audits(ledger) if a.dice is None and a.round not in undone]
    return [a for a in left if (a.case, a.mask, a.image) not in over]


def audited_pairs(ledger: Ledger, names: Iterable[str]) -> dict[str, list[Pair]]:
    """The answered audits, oldest first, of each of these labels that the networks or the person found in the scan."""
    answered = [a for a in audits(ledger) if a.dice is not None]
    found: dict[str, list[Pair]] = {name: [] for name in names}
    for name, pairs in found.items():
        for audit in answered:
            agreement, dice = audit.agreement.get(name), (audit.dice or {}).get(name)
            if agreement is not None and dice is not None:
                pairs.append(Pair(audit.case, agreement, dice, audited=True))
    return found


def kept_since(ledger: Ledger, rounds: Iterable[RoundRow]) -> dict[str, tuple[int, float]]:
    """What the audits of promoted masks say that were drawn after a round had promised something.

    Returns:
        Label to the number of answers and their mean Dice, for labels that have one.
    """
    made = {r.number: r.summary.get("promise", {}) for r in rounds if r.state == "done"}
    found: dict[str, list[float]] = {}
    for audit in audits(ledger):
        for name, dice in (audit.dice or {}).items():
            if dice is not None and audit.promoted and made.get(audit.round, {}).get(name, {}).get("made"):
                found.setdefault(name, []).append(dice)
    return {name: (len(values), sum(values) / len(values)) for name, values in found.items()}


def promise_lines(
    promise: Mapping[str, Mapping[str, Any]], since: Mapping[str, tuple[int, float]] | None = None
) -> list[str]:
    """What a round promised, a line for each label; none where the round asked for nothing.

    Args:
        promise: ``promise`` of its summary.
        since: :func:`kept_since`.
    """
    return [f"{name}: {_promised(about, (since or {}).get(name))}" for name, about in promise.items()]


def promises_by_round(ledger: Ledger, rounds: Sequence[RoundRow]) -> dict[int, list[str]]:
    """:func:`promise_lines` of the rounds that measured something; the audits since stand with the last one."""
    since = kept_since(ledger, rounds)
    about = {r.number: r.summary["promise"] for r in rounds if r.summary.get("promise")}
    last = max(about, default=0)
    return {number: promise_lines(found, since if number == last else None) for number, found in about.items()}


def _promised(about: Mapping[str, Any], since: tuple[int, float] | None) -> str:
    target, answered = about["target"], _counted(about["audits"])
    if about.get("withdrawn"):
        return "no promise: the promotions of this round were withdrawn, and those of before stand again"
    if about["missing"]:
        return f"no promise yet: {about['missing']} more audit{'' if about['missing'] == 1 else 's'}"
    if about["made"]:
        least = f"at least {target:g} ({about['confidence']:g} confidence)"
        text = f"promised: mean Dice of the promoted {least}, from {answered}"
    elif about["bound"] is None:
        text = f"no promise: no scan that could be promoted holds it ({answered})"
    else:
        bound = f"the highest lower bound of mean Dice is {about['bound']:.3f}"
        text = f"no promise: {target:g} is asked, and {bound}, from {answered}"
    if since:
        count, mean = since
        text += f"; {_counted(count)} since: mean Dice {mean:.3f}, {'kept' if mean >= target else 'NOT kept'}"
    return text


def _counted(count: int) -> str:
    return f"{count} audit{'' if count == 1 else 's'}"
