"""Why scans were promoted or not: kept with the round, and read from rounds that did not keep it."""

from __future__ import annotations

from typing import Any

from aslseg.rounds.ledger.ledger import RoundRow, Score
from aslseg.rounds.promotion.decisions import NOT_KEPT, count_reasons, decisions_of, why_nothing


def ended(number: int = 1, **summary: Any) -> RoundRow:
    return RoundRow(number, "done", "2026-11-26T01:00:00+00:00", 1, "2026-11-26T02:00:00+00:00", summary)


def kept(agreement: float, *reasons: str, promoted: bool = False) -> dict[str, Any]:
    return {"agreement": agreement, "per_label": {"liver": agreement}, "promoted": promoted, "reasons": [*reasons]}


def test_reasons_are_counted_without_what_was_measured() -> None:
    decisions = {
        "a": kept(0.5, "liver: agreement 0.500 below 0.9", "liver: volume 12.30 ml outside 200.00..9000.00 ml"),
        "b": kept(0.6, "liver: agreement 0.600 below 0.9", "liver: 40 pieces, more than 30"),
        "c": kept(0.95, promoted=True),
        "d": kept(float("nan"), "liver: agreement nan below 0.9"),
        "e": kept(0.91, "passed, but 1 scans agree better (promote_fraction 0.2)"),
    }
    found = decisions_of(ended(promoted=["c"], decisions=decisions))
    assert {d.case for d in found} == set("abcde")
    assert [d.case for d in found if d.promoted] == ["c"]
    assert count_reasons(found) == [
        ("liver: agreement below 0.9", 3),
        ("liver: more pieces than human labels", 1),
        ("liver: volume unlike human labels", 1),
        ("passed, but others agree better (promote_fraction 0.2)", 1),
    ]


def test_why_a_round_promoted_nothing() -> None:
    decisions = {
        c: kept(0.5, "liver: agreement 0.500 below 0.9", *more) for c, more in {"a": (), "b": ("odd",)}.items()
    }
    row = ended(promoted=[], decisions=decisions)
    assert why_nothing(row) == "liver: agreement below 0.9 (2 scans); odd (1 scan)"
    assert why_nothing(row, most=1) == "liver: agreement below 0.9 (2 scans); 1 more reasons"
    assert why_nothing(ended(promoted=["a"], decisions=decisions)) == ""
    assert why_nothing(ended(promoted=[], decisions={})) == "there was no scan without a human label"
    assert why_nothing(RoundRow(2, "open", "", 1)) == ""


def test_rounds_of_earlier_versions_kept_only_agreements() -> None:
    row = ended(2, promoted=["a"], agreement={"a": 0.9, "b": 0.4})
    without = decisions_of(row)
    assert [(d.case, d.promoted, d.reasons) for d in without] == [("b", False, (NOT_KEPT,)), ("a", True, ())]
    scores = [
        Score("b", 2, 0.4, {"per_label": {"liver": 0.4}, "reasons": ["liver: agreement 0.400 below 0.9"]}),
        Score("a", 2, 0.9, {"per_label": {"liver": 0.9}, "reasons": []}),
    ]
    assert decisions_of(row, scores)[0].reasons == ("liver: agreement 0.400 below 0.9",)
    assert decisions_of(row, scores)[0].per_label == {"liver": 0.4}
    # a later ranking says nothing of this round
    later = [Score(s.case, 3, s.agreement, s.details) for s in scores]
    assert decisions_of(row, later)[0].reasons == (NOT_KEPT,)
