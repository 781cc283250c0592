"""Who gets which scan."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest

from aslseg.agreement.plausibility import WORTH_A_LOOK
from aslseg.cases.scan_checks import ScanChecks
from aslseg.rounds.ledger.ledger import Entry, Ledger, Score
from aslseg.serving.scoring import AgreementScoring
from aslseg.serving.strategies import ByAgreement, ByAudit, Leases, Random


class Store:
    """What strategies and scoring ask of a datastore."""

    def __init__(self, cases: list[str], folder: Path) -> None:
        self.cases, self.infos, self.folder = cases, {}, folder
        for case in cases:
            nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), self.get_image_uri(case))

    def get_unlabeled_images(self) -> list[str]:
        return list(self.cases)

    def get_image_uri(self, case: str) -> str:
        return str(self.folder / f"{case}.nii.gz")

    def update_infos(self, infos: dict) -> None:
        self.infos |= infos


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.set_scores([Score(c, 1, a, {}) for c, a in (("a", 0.9), ("b", 0.2), ("c", 0.5), ("done", 0.1))])
    return ledger


def by_agreement(ledger: Ledger, leases: Leases | None = None, highest: bool = False) -> ByAgreement:
    return ByAgreement(ledger, leases or Leases(), ScanChecks(1e6), highest, "")


def at_random(seed: int = 0, leases: Leases | None = None) -> Random:
    return Random(leases or Leases(), ScanChecks(1e6), np.random.default_rng(seed))


def test_lowest_and_highest_first_without_labelled_ones(ledger: Ledger, tmp_path: Path) -> None:
    store = Store(["a", "b", "c", "new"], tmp_path)
    lowest = by_agreement(ledger)({"client_id": "ann"}, store)
    assert (lowest["id"], lowest["agreement"], lowest["rank"]) == ("b", 0.2, 1)
    assert "lowest agreement" in lowest["reason"]
    assert by_agreement(ledger, highest=True)({"client_id": "ann"}, store)["id"] == "a"


def test_without_scores_in_the_order_of_names(tmp_path: Path) -> None:
    result = by_agreement(Ledger(tmp_path / "none.sqlite"))({}, Store(["y", "x"], tmp_path))
    assert (result["id"], result["agreement"]) == ("x", None)
    assert not (tmp_path / "none.sqlite").exists()


def test_two_annotators_share_only_when_nothing_else_is_left(ledger: Ledger, tmp_path: Path) -> None:
    leases, store = Leases(), Store(["a", "b", "c"], tmp_path)
    strategy = by_agreement(ledger, leases)
    order = [strategy({"client_id": who}, store)["id"] for who in ("ann", "bob", "ann", "bob", "eve")]
    assert order == ["b", "c", "a", "b", "c"], "bob and eve get what was handed out longest ago"


def test_a_lease_ends(ledger: Ledger, tmp_path: Path) -> None:
    now = [0.0]
    store = Store(["a", "b", "c"], tmp_path)
    strategy = by_agreement(ledger, Leases(60, lambda: now[0]))
    assert strategy({"client_id": "ann"}, store)["id"] == "b"
    assert strategy({"client_id": "bob"}, store)["id"] == "c"
    now[0] = 61
    assert strategy({"client_id": "eve"}, store)["id"] == "b"


def test_asking_again_without_saving_gives_another_one(ledger: Ledger, tmp_path: Path) -> None:
    leases, store = Leases(), Store(["a", "b", "c"], tmp_path)
    strategy = by_agreement(ledger, leases)
    order = [strategy({"client_id": "ann"}, store)["id"] for _ in range(7)]
    assert order == ["b", "c", "a", "b", "c", "a", "b"], "from the beginning once all were seen"
    store.cases.remove("c")
    leases.release("c")
    assert [strategy({"client_id": "ann"}, store)["id"] for _ in range(3)] == ["a", "b", "a"]


def test_what_was_left_in_the_morning_comes_first_again_the_next_day(ledger: Ledger, tmp_path: Path) -> None:
    now = [0.0]
    strategy, store = by_agreement(ledger, Leases(60, lambda: now[0])), Store(["a", "b", "c"], tmp_path)
    assert strategy({"client_id": "ann"}, store)["id"] == "b"
    now[0] = 120
    assert strategy({"client_id": "ann"}, store)["id"] == "c"
    now[0] = 24 * 3600
    assert strategy({"client_id": "ann"}, store)["id"] == "b"


def test_nobody_in_particular_gets_another_each_time(ledger: Ledger, tmp_path: Path) -> None:
    strategy, store = by_agreement(ledger), Store(["a", "b", "c"], tmp_path)
    order = [strategy({"client_id": "user-xyz"}, store)["id"] for _ in range(6)]
    assert order == ["b", "c", "a"] * 2, "all are held: better than no work, and not always the same"


def test_nothing_left(ledger: Ledger, tmp_path: Path) -> None:
    assert by_agreement(ledger)({}, Store([], tmp_path)) == {}
    assert at_random()({}, Store([], tmp_path)) == {}


def test_random_takes_any_and_all(tmp_path: Path) -> None:
    store = Store(["a", "b", "c"], tmp_path)
    first = [at_random(seed)({"client_id": "ann"}, store)["id"] for seed in range(60)]
    assert all(10 <= first.count(case) <= 30 for case in "abc"), first
    strategy = at_random()
    assert {strategy({"client_id": "ann"}, store)["id"] for _ in range(3)} == {"a", "b", "c"}


@pytest.mark.parametrize("kind", ["agreement", "random"])
def test_a_scan_that_cannot_be_read_is_never_handed_out(ledger: Ledger, tmp_path: Path, kind: str) -> None:
    store = Store(["a", "b", "c"], tmp_path)
    cut = Path(store.get_image_uri("b"))
    cut.write_bytes(cut.read_bytes()[:-9])
    strategy = by_agreement(ledger) if kind == "agreement" else at_random()
    assert {strategy({"client_id": "ann"}, store)["id"] for _ in range(5)} == {"a", "c"}
    assert [m.partition(":")[0] for m in strategy.checks.messages()] == ["b.nii.gz"]
    store.cases[:] = ["b"]
    assert strategy({"client_id": "ann"}, store) == {}
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), cut)
    assert strategy({"client_id": "ann"}, store)["id"] == "b", "once it was copied again"


def test_a_scan_that_cannot_be_read_stays_with_nobody(ledger: Ledger, tmp_path: Path) -> None:
    """Another annotator's lease on it, from before it was damaged, is as it was."""
    leases, store = Leases(), Store(["a", "b"], tmp_path)
    assert leases.take(["b", "a"], "ann") == "b"
    assert leases.take(["b", "a"], "ann", lambda case: case != "b") == "a"
    assert leases.take(["b"], "bob", lambda case: False) is None
    assert leases.take(["a", "b"], "bob") == "b"
    assert store.cases == ["a", "b"]


def test_scoring_copies_the_ledger(ledger: Ledger, tmp_path: Path) -> None:
    store = Store(["a"], tmp_path)
    assert AgreementScoring(ledger)({}, store) == {"scored": 4}
    assert store.infos["b"]["aslseg"]["agreement"] == 0.2


def audit(number: int, case: str, mask: str = "m") -> Entry:
    about = {"sha256": mask, "image": "i", "agreement": {"liver": 0.9}, "promoted": True}
    return Entry("audit", number, case, "aslseg_pseudo", about)


def test_audits_are_handed_out_oldest_first_until_they_are_answered(ledger: Ledger, tmp_path: Path) -> None:
    store, strategy = Store(["a", "b", "c"], tmp_path), ByAudit(ledger, Leases(), ScanChecks(1e6), "")
    none = strategy({"client_id": "ann"}, store)
    assert (none["id"], none["audit"]) == ("b", None)
    assert none["reason"] == "no audit waits; lowest agreement, 1 of 3 (0.200): a human helps most here"

    ledger.append([Entry("opened", 1), audit(1, "c"), Entry("closed", 1), Entry("opened", 2), audit(2, "a")])
    order = [strategy({"client_id": who}, store) for who in ("bob", "eve", "joe")]
    assert [(r["id"], r["audit"]) for r in order] == [("c", 1), ("a", 2), ("b", None)]
    assert order[0]["reason"].startswith("audit, 1 of 2: drawn at random after round 1")
    assert order[2]["reason"].startswith("no audit waits; lowest agreement")

    ledger.append([Entry("checked", 1, "c", "aslseg_pseudo", {"mask": "m", "label": "l", "dice": {"liver": 1.0}})])
    store.cases.remove("c")
    fresh = ByAudit(ledger, Leases(), ScanChecks(1e6), "")
    assert fresh({"client_id": "ann"}, store)["id"] == "a"
    ledger.append([Entry("closed", 2), Entry("rolled back", 2)])
    assert strategy({"client_id": "zoe"}, store)["audit"] is None, "another order as soon as the ledger says so"
    assert by_agreement(ledger)({"client_id": "ann"}, store)["id"] == "b", "other strategies know nothing of audits"


def test_masks_unlike_human_labels_come_after_the_audits_and_before_the_rest(tmp_path: Path) -> None:
    """Where shape and place are no reason against a mask, they send it to a person."""
    ledger, store = Ledger(tmp_path / "ledger.sqlite"), Store(["a", "b", "c", "d"], tmp_path)
    flag = f"liver: unlike the 5 human labels in shape or place: {WORTH_A_LOOK}"
    about = {"a": {"promote": True, "flags": [flag]}, "b": {"promote": True, "flags": ["tumour: empty in both"]}}
    about |= {"c": {"promote": False, "flags": [flag]}, "d": {"promote": True, "flags": []}}
    ledger.set_scores([Score(c, 1, 0.9 if c == "a" else 0.5, details) for c, details in about.items()])
    ledger.append([Entry("opened", 1), audit(1, "d")])
    strategy = ByAudit(ledger, Leases(), ScanChecks(1e6), "")
    order = [strategy({"client_id": who}, store) for who in ("bob", "eve", "joe")]
    assert [(r["id"], r["audit"]) for r in order] == [("d", 1), ("a", None), ("b", None)]
    assert order[1]["reason"] == f"no audit waits; {flag}"
    assert order[2]["reason"].startswith("no audit waits; lowest agreement")


def test_an_audit_whose_scan_is_gone_or_labelled_is_passed_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    strategy = ByAudit(ledger, Leases(), ScanChecks(1e6), "")
    assert strategy({}, Store([], tmp_path)) == {}
    ledger.append([Entry("opened", 1), audit(1, "gone"), audit(1, "b")])
    assert strategy({}, Store(["a", "b"], tmp_path))["id"] == "b"


def test_a_saved_label_takes_its_scan_out_of_the_order_and_sorts_nothing(ledger: Ledger, tmp_path: Path) -> None:
    """With ten thousand scans, reading and sorting the scores again would keep each annotator waiting."""
    store, strategy = Store(["a", "b", "c", "new"], tmp_path), by_agreement(ledger)
    assert strategy({"client_id": "ann"}, store)["id"] == "b"
    with mock.patch.object(Ledger, "agreements", side_effect=AssertionError("the scores were read again")):
        store.cases = ["a", "c", "new"]
        found = strategy({"client_id": "ann"}, store)
        assert (found["id"], found["rank"], found["reason"].split(",")[1][:7]) == ("c", 1, " 1 of 2")
        assert [strategy({"client_id": "ann"}, store)["id"] for _ in range(2)] == ["a", "new"]
    ledger.set_scores([Score(c, 2, a, {}) for c, a in (("a", 0.1), ("c", 0.6), ("new", 0.05))])
    for case in store.cases:
        strategy.leases.release(case)
    assert [strategy({"client_id": "eve"}, store)["id"] for _ in range(3)] == ["new", "a", "c"]
