"""What is taken back stays so: masks, models and the promotions of a rejected round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from aslseg.cases.studies import PSEUDO
from aslseg.errors import LedgerError, RoundRunningError
from aslseg.models.kinds import ModelKind
from aslseg.models.published import Candidate, manifest, prune, put_manifest, stage_files
from aslseg.rounds.gate.publishing import files_of_kept_rounds
from aslseg.rounds.label_files.masks import KEEP_ROUNDS, MaskStore, verify_label_files
from aslseg.rounds.label_files.rollback import roll_back, roll_back_case, roll_back_model
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.ledger.vetoes import MASK_VETO, mask_vetoes, model_vetoes, veto_model
from aslseg.rounds.promotion import promotion
from aslseg.rounds.run import run_round
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.settings import Paths, Settings
from tiny_rounds import Judged, label_hashes, published_hashes, tiny_settings, tiny_studies


def studies_and_settings(root: Path, **conf: object) -> tuple[Path, Settings, Ledger]:
    studies = tiny_studies(root, cases=5)
    settings = tiny_settings(root, promote_fraction=1, **conf)
    return studies, settings, Ledger(Paths(settings, studies).ledger)


def promoted_files(studies: Path) -> set[str]:
    return {k.split("/")[1].removesuffix(".nii.gz") for k in label_hashes(studies) if k.startswith(PSEUDO)}


@pytest.mark.usefixtures("plausible")
def test_a_rejected_round_withdraws_its_promotions_and_the_next_starts_from_what_is_published(
    tmp_path: Path, judged: Judged
) -> None:
    studies, settings, ledger = studies_and_settings(tmp_path)
    paths = Paths(settings, studies)
    good: set[str] = set()
    judged(lambda digest: 0.9 if not good or digest in good else 0.1)
    first = run_round(studies, settings)
    assert first["promoted"] == ["phantom_003", "phantom_004"]
    assert first["withdrawn"] == []
    good.add(published_hashes(settings, studies)["ssl"])
    labels = {k: v for k, v in label_hashes(studies).items() if k.startswith(PSEUDO)}

    # another label: the networks learn anew, and this time nothing good
    shutil.copy(tmp_path / "studies_truth" / "phantom_003.nii.gz", studies / "labels" / "final")
    second = run_round(studies, settings)
    assert "ssl: not published" in second["published"][0]
    assert (second["promoted"], second["withdrawn"]) == ([], ["phantom_004"])
    # what stands is what the published model learned from, without the scan that a person has labelled
    assert {k: v for k, v in label_hashes(studies).items() if k.startswith(PSEUDO)} == {
        k: v for k, v in labels.items() if "phantom_004" in k
    }
    assert {p.case: (p.round, p.status) for p in ledger.promotions()} == {"phantom_004": (1, "active")}
    assert [p.status for p in ledger.promotions(active_only=False) if p.round == 2] == ["withdrawn"]
    assert verify_label_files(paths) == []
    started = ledger.masks(PSEUDO)["phantom_004"].details["sha256"]
    assert started == labels[f"{PSEUDO}/phantom_004.nii.gz"]

    third = run_round(studies, settings)
    inputs = json.loads(Path(third["models"]["ssl"]).with_name("inputs.json").read_text())
    assert [(case, mask) for case, _, mask, _ in inputs["promoted"]] == [("phantom_004", started)]
    assert verify_label_files(paths) == []


@pytest.mark.usefixtures("plausible")
def test_what_was_taken_back_does_not_come_again_in_the_next_round(tmp_path: Path, judged: Judged) -> None:
    judged(lambda _: 0.5)
    studies, settings, ledger = studies_and_settings(tmp_path)
    paths = Paths(settings, studies)
    assert run_round(studies, settings)["promoted"] == ["phantom_003", "phantom_004"]
    masks = {p.case: p.sha256 for p in ledger.promotions()}
    sam = published_hashes(settings, studies)["sam"]
    roll_back(paths, 1)
    assert mask_vetoes(ledger) == {case: {digest} for case, digest in masks.items()}
    ledger.append([veto_model("sam", sam, "it was poor")])

    again = run_round(studies, settings)
    assert again["promoted"] == []
    assert promoted_files(studies) == set()
    reasons = {s.case: s.details["reasons"] for s in ledger.scores()}
    assert reasons == {"phantom_003": [MASK_VETO], "phantom_004": [MASK_VETO]}
    assert again["published"][1] == "sam: not published; this model was rolled back"
    assert set(published_hashes(settings, studies)) == {"ssl", "adapter"}
    assert verify_label_files(paths) == []

    # a person has labelled a scan, and deleted the label since: its veto is over
    ledger.append([Entry("saved", case="phantom_003", tag="final", details={"sha256": "x"})])
    # the one label that judges is too few for a model with other masks, so that the promotion is withdrawn again
    last = run_round(studies, settings)
    assert (last["promoted"], last["withdrawn"]) == ([], ["phantom_003"])


def test_a_mask_that_differs_enough_is_another_one(tmp_path: Path) -> None:
    store = MaskStore(tmp_path)

    def cube(edge: int) -> str:
        mask = np.zeros((12, 12, 12), np.uint8)
        mask[:edge, :10, :10] = 1
        return store.add(mask, np.eye(4))

    round_ = SimpleNamespace(masks=store, labels=Settings().label_set)
    taken_back = {cube(10)}
    assert promotion._is_vetoed(round_, cube(10), taken_back)
    assert promotion._is_vetoed(round_, cube(9), taken_back)  # Dice 0.947
    assert not promotion._is_vetoed(round_, cube(7), taken_back)  # Dice 0.824
    assert not promotion._is_vetoed(round_, store.add(np.ones((12, 12, 3)), np.eye(4)), taken_back)
    assert not promotion._is_vetoed(round_, cube(9), {"0" * 64})  # no longer kept


class Served:
    """A studies folder with rounds that do nothing but publish an SSL model."""

    def __init__(self, root: Path, rounds: int) -> None:
        (root / "studies").mkdir()
        (root / "studies" / "a.nii.gz").write_bytes(b"scan")
        self.paths = Paths(Settings(model_dir=str(root / "models")), root / "studies")
        self.ledger = Ledger(self.paths.ledger)
        for number in range(1, rounds + 1):
            self.ledger.open_round({})
            before = manifest(self.paths)
            made = root / "made"
            made.write_text(f"model {number}")
            after = stage_files(self.paths, [Candidate(ModelKind.SSL, made, 0.5, None, 1)], number)
            self.ledger.append([Entry("published", number, details={"before": before, "after": after, "why": []})])
            put_manifest(self.paths, after)
            self.ledger.close_round(number, {})

    @property
    def number(self) -> int:
        """Round of the model that is served."""
        return int(manifest(self.paths)["ssl"]["round"])


def test_a_model_is_taken_back_step_by_step(tmp_path: Path) -> None:
    served = Served(tmp_path, 3)
    assert roll_back_model(served.paths, "ssl")[0].endswith("of round 2 is served again")
    assert served.number == 2
    roll_back_model(served.paths, "ssl")
    assert served.number == 1
    with pytest.raises(LedgerError, match=r"no earlier ssl model is kept .*; `aslseg ledger rollback --round 1`"):
        roll_back_model(served.paths, "ssl")
    with pytest.raises(LedgerError, match="no sam model is published; published: ssl"):
        roll_back_model(served.paths, "sam")
    assert len(model_vetoes(served.ledger)) == 2
    assert served.ledger.verify() is None


def test_a_model_whose_file_is_gone_is_passed_over(tmp_path: Path) -> None:
    served = Served(tmp_path, 3)
    second = served.ledger.events(kinds=("published",))[1].details["after"]["ssl"]
    (served.paths.models / second["file"]).unlink()
    with pytest.raises(LedgerError, match="rollback of round 3: the ssl model of that time is no longer kept"):
        roll_back(served.paths, 3)
    assert served.number == 3
    roll_back_model(served.paths, "ssl")
    assert served.number == 1


def test_files_that_a_rollback_needs_are_kept_beside_the_newest(tmp_path: Path) -> None:
    served = Served(tmp_path, KEEP_ROUNDS + 3)
    prune(served.paths, 1, files_of_kept_rounds(served.ledger))
    assert len(list(served.paths.models.glob("ssl-*"))) == KEEP_ROUNDS + 1
    roll_back(served.paths, 4)
    assert served.number == 3
    prune(served.paths, 1)
    assert len(list(served.paths.models.glob("ssl-*"))) == 2  # the newest, and the one that is served


def test_one_scan_is_taken_back(tmp_path: Path) -> None:
    served = Served(tmp_path, 1)
    store = MaskStore(served.paths.home)
    digest = store.add(np.ones((2, 2, 2)), np.eye(4))
    details = {"sha256": digest, "agreement": {}, "threshold": {}, "models": {}}
    served.ledger.append([Entry("mask", 1, "a", PSEUDO, details)])
    assert "a: no longer promoted" in roll_back_case(served.paths, "a")[0]
    assert not list((served.paths.studies / "labels").rglob("*.nii.gz"))
    assert mask_vetoes(served.ledger) == {"a": {digest}}
    store.prune(served.ledger)
    assert store.path(digest).exists()
    with pytest.raises(LedgerError, match="'a' has no promoted mask; promoted now: none"):
        roll_back_case(served.paths, "a")
    with round_lock(served.paths.home), pytest.raises(RoundRunningError, match="already running"):
        roll_back_case(served.paths, "a")


def test_a_rolled_back_round_does_not_bring_back_what_somebody_took_back_before(tmp_path: Path) -> None:
    served = Served(tmp_path, 3)
    (served.paths.studies / "b.nii.gz").write_bytes(b"scan")
    store = MaskStore(served.paths.home)
    for case, size in (("a", 2), ("b", 3)):
        details = {"sha256": store.add(np.ones((size,) * 3), np.eye(4)), "agreement": {}, "threshold": {}, "models": {}}
        served.ledger.append([Entry("mask", 3, case, PSEUDO, details)])
    served.ledger.open_round({})
    served.ledger.close_round(4, {})
    # the models of rounds 3 and 2, one after the other, and a mask of round 3
    roll_back_model(served.paths, "ssl")
    roll_back_model(served.paths, "ssl")
    roll_back_case(served.paths, "a")
    assert served.number == 1
    roll_back(served.paths, 4)
    assert served.number == 1, "the models of rounds 2 and 3 were taken back"
    assert [p.case for p in served.ledger.promotions()] == ["b"]
    assert promoted_files(served.paths.studies) == {"b"}
    roll_back(served.paths, 3)
    assert served.number == 1
    assert mask_vetoes(served.ledger).keys() == {"a", "b"}


def test_where_every_model_was_taken_back_none_is_served(tmp_path: Path) -> None:
    served = Served(tmp_path, 2)
    first = served.ledger.events(kinds=("published",))[0].details["after"]["ssl"]
    served.ledger.append([veto_model("ssl", first["sha256"], "it was poor")])
    assert "published models are those from before round 2: none" in roll_back(served.paths, 2)
    assert manifest(served.paths) == {}
