"""The mean over fresh labels, from events alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aslseg.rounds.gate.fresh import LAST, SHOWN, mean_over_labels, pooled, stated
from aslseg.rounds.ledger.ledger import Event


def event(seq: int, case: str, **dice: dict[str, float | None]) -> Event:
    return Event("fresh", 1, case, details={"dice": dice, "models": {}, "label": f"{case}{seq}"}, seq=seq)


def test_the_mean_is_over_the_newest_scans_that_hold_the_label() -> None:
    old = [event(n, f"old{n}", ssl={"liver": 0.1, "tumour": 0.4}) for n in range(5)]
    new = [event(10 + n, f"new{n}", ssl={"liver": 0.9, "tumour": None}) for n in range(LAST)]
    found = pooled([*old, *new])["ssl"]
    assert found["liver"] == {"dice": pytest.approx(0.9), "scans": LAST}
    assert found["tumour"] == {"dice": pytest.approx(0.4), "scans": 5}
    assert mean_over_labels(found) == (pytest.approx(0.65), LAST)
    assert mean_over_labels({}) == (None, 0)


def test_of_a_scan_whose_label_was_corrected_the_last_counts() -> None:
    events = [event(1, "a", ssl={"liver": 0.2}), event(2, "b", ssl={"liver": 0.6}), event(3, "a", ssl={"liver": 0.8})]
    assert pooled(events)["ssl"]["liver"] == {"dice": pytest.approx(0.7), "scans": 2}


def test_what_annotators_were_shown_is_stated_before_what_the_ssl_model_draws() -> None:
    ssl = {"ssl": {"liver": 0.5}}
    assert stated(pooled([event(1, "a", **ssl)])) == {"liver": {"dice": 0.5, "scans": 1}}
    both = ssl | {SHOWN: {"liver": 0.75}}
    assert stated(pooled([event(1, "a", **both)])) == {"liver": {"dice": 0.75, "scans": 1}}
    assert stated(pooled([])) == {}


def test_stating_it_imports_no_torch() -> None:
    code = "import sys; from aslseg.rounds.gate import fresh; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
