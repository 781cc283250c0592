"""How many masks a round may promote, by label, and what it says of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aslseg.agreement.measures import Agreement
from aslseg.agreement.promise import Pair
from aslseg.agreement.promotion_rules import Verdict, without_thresholds
from aslseg.rounds.ledger.audits import promise_lines
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion.promises import Promises, withdrawn
from aslseg.settings import Settings


def known(level: float, count: int = 14) -> list[Pair]:
    """Pairs whose Dice is the agreement plus something."""
    return [Pair(f"p{n}", a, a + level, n > 6) for n, a in enumerate(np.linspace(0.6, 0.95, count))]


def promises(tmp_path: Path, crossed: dict[str, list[Pair]], **conf: object) -> Promises:
    return Promises.of(Settings(**conf), Ledger(tmp_path / "none.sqlite"), crossed)  # type: ignore[arg-type]


def masks(*liver: float | None, tumour: float | None = None) -> list[dict[str, float | None]]:
    return [{"liver": value, "tumour": tumour} for value in liver]


def test_the_largest_number_whose_bound_reaches_the_target_and_fewer_for_a_higher_one(tmp_path: Path) -> None:
    crossed, ranked = {"liver": known(0)}, masks(*np.linspace(0.98, 0.5, 60))
    found = {
        t: promises(tmp_path, crossed, promote_target=f"{t:g}").largest(ranked) for t in (0.6, 0.7, 0.8, 0.9, 0.99)
    }
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found[0.6] == 60
    assert 0 < found[0.8] < 60
    assert found[0.99] == 0
    line = promises(tmp_path, crossed).lines["liver"]
    bounds = line.lower_bounds([m["liver"] or 0 for m in ranked], 0.9)
    assert bounds[found[0.8] - 1] >= 0.8
    assert (bounds[found[0.8] :] < 0.8).all()


def test_every_label_must_reach_its_own_target(tmp_path: Path) -> None:
    good, poor = known(0.02), known(-0.5)
    ranked = masks(*[0.95] * 20, tumour=0.9)
    both = promises(tmp_path, {"liver": good, "tumour": poor}, promote_target="0.7")
    assert both.largest(ranked) == 0
    assert promises(tmp_path, {"liver": good, "tumour": poor}, promote_target="0.7,tumour=0.1").largest(ranked) == 20
    assert promises(tmp_path, {"liver": good}, promote_target="0.7").largest(ranked) == 20, "no bound, nothing asked"
    assert set(both.about(ranked, 0)) == {"liver", "tumour"}
    off = promises(tmp_path, {"liver": good, "tumour": poor}, promote_target="0")
    assert (off.largest(ranked), off.about(ranked, 20)) == (20, {})


def test_scans_in_which_both_find_nothing_of_a_label_do_not_count_for_it(tmp_path: Path) -> None:
    found = promises(tmp_path, {"liver": known(0.02), "tumour": known(0.02)}, promote_target="0.7")
    ranked = [*masks(*[0.95] * 6, tumour=0.95), *masks(*[0.95] * 6)]
    assert found.largest(ranked) == 12
    about = found.about(ranked, 12)
    assert (about["liver"]["k"], about["tumour"]["k"]) == (12, 6)
    assert about["tumour"]["bound"] == pytest.approx(found.lines["tumour"].lower_bounds([0.95] * 6, 0.9)[-1])
    none = found.about(masks(*[0.95] * 6), 6)["tumour"]
    assert (none["made"], none["bound"]) == (False, None)
    assert "no scan that could be promoted holds it" in promise_lines({"tumour": none})[0]
    assert found.largest([]) == 0


def test_a_scan_that_was_audited_is_counted_once(tmp_path: Path) -> None:
    from aslseg.rounds.ledger.ledger import Entry

    ledger = Ledger(tmp_path / "ledger.sqlite")
    about = {"sha256": "m", "image": "i", "agreement": {"liver": 0.9}, "promoted": True}
    checked = {"mask": "m", "label": "l", "dice": {"liver": 0.8}}
    ledger.append([Entry("audit", 1, "p3", "t", about), Entry("checked", 1, "p3", "t", checked)])
    found = Promises.of(Settings(), ledger, {"liver": known(0)}).pairs["liver"]
    assert [(p.agreement, p.dice, p.audited) for p in found if p.case == "p3"] == [(0.9, 0.8, True)]
    assert len(found) == 14


def test_what_is_said_of_it(tmp_path: Path) -> None:
    made = promises(tmp_path, {"liver": known(0.02)}, promote_target="0.8", promote_confidence=0.8)
    ranked = masks(*[0.95] * 10)
    about = made.about(ranked, made.largest(ranked))
    first = "promised: mean Dice of the promoted at least 0.8 (0.8 confidence), from 7 audits"
    assert promise_lines(about) == [f"liver: {first}", "tumour: no promise yet: 9 more audits"]
    assert about["liver"]["r"] == pytest.approx(0.97, abs=0.03)
    since = {"liver": (2, 0.9)}
    assert promise_lines(about, since)[0].endswith("7 audits; 2 audits since: mean Dice 0.900, kept")
    assert promise_lines(about, {"liver": (1, 0.79)})[0].endswith("; 1 audit since: mean Dice 0.790, NOT kept")
    assert "withdrawn" in promise_lines(withdrawn(about))[0]
    low = promises(tmp_path, {"liver": known(-0.3)}, promote_target="0.8")
    text = promise_lines(low.about(ranked, 0))[0]
    assert text.startswith("liver: no promise: 0.8 is asked, and the highest lower bound of mean Dice is 0.66")
    assert promise_lines({}) == []
    assert made.refusal(3) == "passed, but the promise (mean Dice liver 0.8) holds for 3 scans only (promote_target)"
    assert made.refusal(0) == "passed, but the promise (mean Dice liver 0.8) holds for no scan (promote_target)"


def test_a_verdict_without_fixed_thresholds_keeps_every_other_reason() -> None:
    agreement = Agreement({"liver": 0.6, "tumour": float("nan")}, 0.6)
    reasons = ("liver: agreement 0.600 below 0.9", "tumour: agreement nan below 0.7", "liver: 40 pieces, more than 30")
    asked = {"liver": 0.9, "tumour": 0.7, "vessel": 0.5}
    found = without_thresholds(Verdict(False, reasons), agreement, asked)
    assert found == Verdict(False, reasons[1:])
    assert without_thresholds(Verdict(False, reasons[:1]), agreement, asked) == Verdict(True)
    assert without_thresholds(Verdict(False, reasons), agreement, {}) == Verdict(False, reasons)
    unknown = Verdict(False, ("vessel: agreement unknown",))
    assert without_thresholds(unknown, agreement, asked) == unknown


def test_settings_of_old_files_are_read_and_new_ones_checked() -> None:
    assert Settings().targets == {"liver": 0.85, "tumour": 0.7}
    assert Settings(labels="a,b", nested="", promote_target="auto,b=0.6").targets == {"a": 0.85, "b": 0.6}  # type: ignore[arg-type]
    assert Settings(promote_target="0.9").model_dump()["promote_target"] == "0.9"  # type: ignore[arg-type]
    assert Settings.model_validate(Settings().model_dump()).targets == Settings().targets
    for wrong in ("auto,auto", "auto,0.9", "1.5", "lung=0.9", "high"):
        with pytest.raises(ValueError, match="promote_target"):
            Settings(promote_target=wrong)  # type: ignore[arg-type]
