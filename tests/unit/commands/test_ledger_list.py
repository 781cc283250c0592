"""``aslseg ledger list`` and ``aslseg round``: what was promised of promoted masks, in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aslseg import console
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.settings import Paths
from tiny_rounds import tiny_settings, tiny_studies

Run = Callable[..., tuple[int, str, str]]
ABOUT = {"target": 0.85, "confidence": 0.9, "bound": 0.86, "k": 9, "audits": 6, "pairs": 14, "r": 0.9, "missing": 0}
MADE = "promised: mean Dice of the promoted at least 0.85 (0.9 confidence), from 6 audits"


def test_each_round_says_what_it_promised(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    studies, settings = tiny_studies(tmp_path, cases=1, labelled=1), tiny_settings(tmp_path)
    ledger = Ledger(Paths(settings, studies).ledger)
    for number, about in ((1, {"made": False, "missing": 2}), (2, {"made": True})):
        ledger.append([Entry("opened", number)])
        ledger.close_round(number, {"promise": {"liver": ABOUT | about}})
    drawn = {"sha256": "m", "image": "i", "agreement": {"liver": 0.9}, "promoted": True}
    answered = {"mask": "m", "label": "l", "dice": {"liver": 0.9}}
    ledger.append([Entry("audit", 2, "a", "t", drawn), Entry("checked", 2, "a", "t", answered)])
    since = f"liver: {MADE}; 1 audit since: mean Dice 0.900, kept"
    lines = run("ledger", "list", "--studies", studies)[1].splitlines()
    assert "  liver: no promise yet: 2 more audits" in lines
    assert f"  {since}" in lines
    monkeypatch.setattr(console, "on_terminal", lambda _: True)
    table = run("ledger", "list", "--studies", studies)[1]
    assert "Promises" in table
    assert since in table


def test_a_finished_round_prints_words_instead_of_numbers() -> None:
    summary = {"agreement": {}, "decisions": {}, "promise": {"liver": ABOUT | {"made": True}}}
    assert console.brief(summary)["promise"] == [f"liver: {MADE}"]
