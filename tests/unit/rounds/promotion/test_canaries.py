"""Validation scans that show that a promotion would be wrong: the label is not promoted in that round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.agreement.promotion_rules import Verdict
from aslseg.cases.studies import PSEUDO
from aslseg.models.cascade import CascadeInput, StageOutput
from aslseg.models.kinds import ModelKind
from aslseg.rounds.gate import publishing
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion.canaries import Canary, canary, find_stops, in_words, stopped, summarise
from aslseg.rounds.run import run_round
from aslseg.rounds.steps import pipeline
from aslseg.settings import Paths, Settings
from aslseg.types import Labels
from aslseg.volume.io import case_id, read_image
from tiny_rounds import label_hashes, tiny_settings, tiny_studies

LABELS = Labels.of(["liver", "tumour"], [("tumour", "liver")])
LEAST = {"liver": 0.5, "tumour": 0.5}
JUDGE = "phantom_000"


def class_map(liver: slice, tumour: slice = slice(0)) -> np.ndarray:
    found = np.zeros((20, 4, 4), np.uint8)
    found[liver] = 1
    found[tumour] = 2
    return found


TRUTH = class_map(slice(2, 12), slice(4, 6))
GOOD = Verdict(True)


@pytest.mark.parametrize(
    ("mask", "verdict", "stops"),
    [
        (TRUTH, GOOD, []),
        (class_map(slice(2, 12), slice(8, 10)), GOOD, [("tumour", True)]),
        (class_map(slice(10, 20), slice(10, 12)), GOOD, [("liver", True), ("tumour", True)]),
        (class_map(slice(2, 12)), GOOD, [("tumour", False)]),
        (class_map(slice(10, 20)), Verdict(False, ("liver: volume",)), []),
    ],
)
def test_what_stops_a_label(mask: np.ndarray, verdict: Verdict, stops: list[tuple[str, bool]]) -> None:
    found = find_stops([canary("a", verdict, mask, TRUTH, LABELS)], LEAST)
    assert [(s.label, s.drawn) for s in found] == stops


def test_a_label_that_is_empty_in_both_stops_nothing() -> None:
    empty = class_map(slice(2, 12))
    assert find_stops([canary("a", GOOD, empty, empty, LABELS)], LEAST) == []


def test_what_is_drawn_wrongly_stops_masks_that_hold_it_and_what_is_missed_those_without() -> None:
    wrong = Canary("a", GOOD, {"liver": 0.9, "tumour": 0.2}, frozenset({"liver", "tumour"}))
    missed = Canary("b", GOOD, {"liver": 0.9, "tumour": 0.0}, frozenset({"liver"}))
    without = class_map(slice(2, 12))
    for found, mask, other, words in (
        (wrong, TRUTH, without, "canary a: tumour would have been promoted with Dice 0.20, floor 0.5"),
        (missed, without, TRUTH, "canary b: tumour would have been promoted with Dice 0.00 (the networks agree that"),
    ):
        stops = find_stops([found], LEAST)
        (reason,) = stopped(GOOD, mask, LABELS, stops).reasons
        assert reason.startswith(words)
        assert not stopped(GOOD, mask, LABELS, stops).promote
        assert stopped(GOOD, other, LABELS, stops) == GOOD
    assert stopped(Verdict(False, ("other",)), TRUTH, LABELS, find_stops([wrong], LEAST)).reasons[0] == "other"
    text = in_words(summarise([wrong, missed], find_stops([wrong, missed], LEAST)))
    assert text == (
        "2 validation scans went through the same verdict: 2 would have been promoted, 2 labels of these wrongly."
    )
    assert in_words({}) == ""


def test_a_dice_that_is_no_number_stops() -> None:
    assert find_stops([Canary("a", GOOD, {"liver": float("nan")}, frozenset({"liver"}))], LEAST)


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Networks that draw the true masks, changed by the function under ``change``, which gets case and class map."""
    found: dict[str, Any] = {"studies": tiny_studies(tmp_path), "change": lambda case, mask: mask}
    studies = found["studies"]
    (studies / "patients.csv").write_text(f"case,patient,role\n{JUDGE},a,validation\nphantom_001,b,train\n")
    truths = {case_id(p): p for f in (studies / "labels" / "final", tmp_path / "studies_truth") for p in f.iterdir()}
    scans = {read_image(p).array.tobytes(): case_id(p) for p in studies.glob("*.nii.gz")}

    def compute(kind: ModelKind, model: Any, given: CascadeInput, before: Any, settings: Settings) -> StageOutput:
        case, labels = scans[given.load_native().array.tobytes()], settings.label_set
        mask = given.grid.label_to_working(read_image(truths[case]).array.astype(np.uint8), labels)
        return StageOutput(labels.regions(found["change"](case, mask)).astype(np.float32))

    monkeypatch.setattr(pipeline, "compute", compute)
    return found


@pytest.mark.usefixtures("quick")
def test_an_error_that_both_networks_share_promotes_nothing(networks: dict[str, Any], tmp_path: Path) -> None:
    """Mirrored livers: right in volume and pieces, and both networks agree on every voxel."""
    studies, settings = networks["studies"], tiny_settings(tmp_path, promote_fraction=1, promote_empty=1)
    networks["change"] = lambda case, mask: mask[::-1]
    summary = run_round(studies, settings)
    assert summary["promoted"] == summary["withdrawn"] == []
    assert summary["canaries"]["passed"] == 1
    assert summary["canaries"]["cases"][JUDGE]["dice"]["liver"] < 0.5
    reason = summary["canaries"]["stops"][0]
    assert reason.startswith(f"canary {JUDGE}: liver would have been promoted with Dice 0.")
    assert reason in summary["warnings"]
    for case in ("phantom_003", "phantom_004", "phantom_005"):
        assert reason in summary["decisions"][case]["reasons"]
    paths = Paths(settings, studies)
    assert all(reason in s.details["reasons"] for s in Ledger(paths.ledger).scores())
    page = (paths.reports / "round-1.html").read_text()
    assert "1 validation scan went through the same verdict: 1 would have been promoted, " in page
    assert not [name for name in label_hashes(studies) if "pseudo" in name]


@pytest.mark.usefixtures("quick")
def test_right_masks_are_promoted_and_the_canary_never(networks: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, promote_fraction=1, promote_empty=1)
    summary = run_round(networks["studies"], settings)
    assert summary["canaries"]["cases"][JUDGE]["dice"]["liver"] == 1
    assert (summary["canaries"]["passed"], summary["canaries"]["stops"]) == (1, [])
    assert set(summary["promoted"]) | set(summary["withdrawn"]) == {"phantom_003", "phantom_004", "phantom_005"}
    assert JUDGE not in summary["decisions"]


@pytest.mark.usefixtures("quick")
def test_a_canary_that_the_verdict_refuses_stops_nothing(networks: dict[str, Any], tmp_path: Path) -> None:
    networks["change"] = lambda case, mask: np.ones_like(mask) if case == JUDGE else mask
    summary = run_round(networks["studies"], tiny_settings(tmp_path, promote_fraction=1, promote_empty=1))
    assert (summary["canaries"]["passed"], summary["canaries"]["stops"]) == (0, [])
    assert summary["canaries"]["cases"][JUDGE]["reasons"]
    assert summary["promoted"] or summary["withdrawn"]


@pytest.mark.usefixtures("quick", "trainings")
def test_what_a_canary_stops_does_not_come_back_when_the_gate_rejects(
    networks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings = networks["studies"], tiny_settings(tmp_path, promote_fraction=1, promote_empty=1)
    assert run_round(studies, settings)["promoted"] == ["phantom_003", "phantom_004", "phantom_005"]
    networks["change"] = lambda case, mask: mask[::-1]
    monkeypatch.setattr(publishing, "gate", lambda *_: (False, "ssl: not published"))
    summary = run_round(studies, settings.model_copy(update={"seed": 5}))
    assert summary["published"][0].startswith("ssl: not published")
    now = Ledger(Paths(settings, studies).ledger).masks(PSEUDO)
    assert {e.kind for e in now.values()} == {"removed"}
    assert all(summary["canaries"]["stops"][0] in e.details["why"] for e in now.values())
    assert not [name for name in label_hashes(studies) if "pseudo" in name]


@pytest.mark.usefixtures("quick", "trainings")
def test_a_mask_that_teaches_a_label_that_is_left_open_now_does_not_stand_again(
    networks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, promote_fraction=1, promote_empty=1, promote_floor="0,tumour=0.6")
    studies, ledger = networks["studies"], Ledger(Paths(settings, networks["studies"]).ledger)
    first = run_round(studies, settings)["promoted"]
    assert not any(e.details.get("unknown") for e in ledger.masks(PSEUDO).values())
    # the networks miss the tumour of the scan whose truth is known
    networks["change"] = lambda case, mask: np.minimum(mask, 1) if case == JUDGE else mask
    monkeypatch.setattr(publishing, "gate", lambda *_: (False, "ssl: not published"))
    summary = run_round(studies, settings.model_copy(update={"seed": 5}))
    assert (summary["canaries"]["stops"], summary["withdrawn"]) == ([], first)
    now = ledger.masks(PSEUDO)
    assert {e.kind for e in now.values()} == {"removed"}, "the earlier masks teach where the tumour is"
    assert all("it teaches tumour (tumour: Dice 0.00 on 1 human label" in e.details["why"] for e in now.values())
    assert not [name for name in label_hashes(studies) if "pseudo" in name]


@pytest.mark.usefixtures("quick", "trainings")
def test_a_canary_stops_no_mask_that_was_promoted_before_and_is_none_of_those_that_it_stops(
    networks: dict[str, Any], tmp_path: Path
) -> None:
    """Else each of these nights draws all promoted masks anew, and trains and predicts anew for it."""
    settings = tiny_settings(tmp_path, promote_fraction=1, promote_empty=1)
    studies, ledger = networks["studies"], Ledger(Paths(settings, networks["studies"]).ledger)
    first = run_round(studies, settings)["promoted"]
    before = {case: e.details["sha256"] for case, e in ledger.masks(PSEUDO).items()}

    def missed(case: str, mask: np.ndarray) -> np.ndarray:
        """No tumour where the truth is known, and elsewhere a liver with one voxel less."""
        if case == JUDGE:
            return np.minimum(mask, 1)
        mask = mask.copy()
        mask[tuple(np.argwhere(mask == 1)[0])] = 0
        return mask

    networks["change"] = missed
    for path in (Paths(settings, studies).rounds / "steps").rglob("*.npz"):
        path.unlink()  # else the masks of the night before are found
    summary = run_round(studies, settings)
    (stop,) = summary["canaries"]["stops"]
    assert "the networks agree that there is none" in stop
    with_tumour = [c for c in first if stop not in summary["decisions"][c]["reasons"]]
    assert with_tumour
    assert summary["promoted"] == with_tumour
    now = {case: e.details["sha256"] for case, e in ledger.masks(PSEUDO).items() if e.kind == "mask"}
    assert now == {case: before[case] for case in with_tumour}, "they hold a tumour, and stay as they are"
