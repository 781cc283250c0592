"""Who gets which scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aslseg.rounds.ledger import Ledger, Score
from aslseg.serving.scoring import AgreementScoring
from aslseg.serving.strategies import ByAgreement, Leases, Random


class Store:
    """The two things that strategies and scoring ask of a datastore."""

    def __init__(self, cases: list[str]) -> None:
        self.cases, self.infos = cases, {}

    def get_unlabeled_images(self) -> list[str]:
        return self.cases

    def update_infos(self, infos: dict) -> None:
        self.infos |= infos


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.set_scores([Score(c, 1, a, {}) for c, a in (("a", 0.9), ("b", 0.2), ("c", 0.5), ("done", 0.1))])
    return ledger


def test_lowest_and_highest_first_without_labelled_ones(ledger: Ledger) -> None:
    store = Store(["a", "b", "c", "new"])
    lowest = ByAgreement(ledger, Leases(), False, "")({"client_id": "ann"}, store)
    assert (lowest["id"], lowest["agreement"], lowest["rank"]) == ("b", 0.2, 1)
    assert "lowest agreement" in lowest["reason"]
    assert ByAgreement(ledger, Leases(), True, "")({"client_id": "ann"}, store)["id"] == "a"


def test_without_scores_in_the_order_of_names(tmp_path: Path) -> None:
    result = ByAgreement(Ledger(tmp_path / "none.sqlite"), Leases(), False, "")({}, Store(["y", "x"]))
    assert (result["id"], result["agreement"]) == ("x", None)
    assert not (tmp_path / "none.sqlite").exists()


def test_two_annotators_never_share_until_the_lease_ends(ledger: Ledger) -> None:
    now = [0.0]
    leases, store = Leases(60, lambda: now[0]), Store(["a", "b", "c"])
    strategy = ByAgreement(ledger, leases, False, "")
    order = [strategy({"client_id": who}, store)["id"] for who in ("ann", "bob", "ann", "bob", "eve")]
    assert order == ["b", "c", "b", "c", "a"]
    now[0] = 61
    assert strategy({"client_id": "bob"}, store)["id"] == "b"


def test_nobody_in_particular_gets_another_each_time(ledger: Ledger) -> None:
    strategy, store = ByAgreement(ledger, Leases(), False, ""), Store(["a", "b", "c"])
    assert {strategy({"client_id": "user-xyz"}, store)["id"] for _ in range(3)} == {"a", "b", "c"}
    assert strategy({"client_id": "user-xyz"}, store)["id"] == "b", "all are held: better than no work"


def test_nothing_left(ledger: Ledger) -> None:
    assert ByAgreement(ledger, Leases(), False, "")({}, Store([])) == {}
    assert Random(Leases(), np.random.default_rng(0))({}, Store([])) == {}


def test_random_takes_any(ledger: Ledger) -> None:
    strategy, store = Random(Leases(), np.random.default_rng(0)), Store(["a", "b", "c"])
    assert {strategy({}, store)["id"] for _ in range(3)} == {"a", "b", "c"}


def test_scoring_copies_the_ledger(ledger: Ledger) -> None:
    store = Store(["a"])
    assert AgreementScoring(ledger)({}, store) == {"scored": 4}
    assert store.infos["b"]["aslseg"]["agreement"] == 0.2
