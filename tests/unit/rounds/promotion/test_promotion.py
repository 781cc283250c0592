"""What is promoted, by the real verdict; that each file is hashed once; and that nothing goes to the working folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.agreement.measures import Agreement
from aslseg.agreement.promotion_rules import Verdict
from aslseg.cases.studies import ORIGINAL
from aslseg.errors import LedgerError
from aslseg.models.cascade import CascadeInput, StageOutput
from aslseg.models.kinds import ModelKind
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion import promotion
from aslseg.rounds.promotion.canaries import Stop
from aslseg.rounds.promotion.decisions import why_nothing
from aslseg.rounds.promotion.promises import Promises
from aslseg.rounds.promotion.state import CaseAssessment, RoundState
from aslseg.rounds.recipes import aslseg as recipe
from aslseg.rounds.run import run_round
from aslseg.rounds.scheduling.progress import Progress
from aslseg.rounds.steps import pipeline
from aslseg.rounds.steps.cases import RoundCases
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.settings import Paths, Settings
from aslseg.types import Labels, no_progress
from aslseg.volume.io import case_id, read_image
from tiny_rounds import label_hashes, tiny_settings, tiny_studies

PLAUSIBLE, TOO_LARGE, DISPUTED = "phantom_003", "phantom_004", "phantom_005"


@pytest.fixture
def known_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A studies folder whose networks draw known masks; one too large, and one that SAM and adapter do not find."""
    studies = tiny_studies(tmp_path)
    truths = {case_id(p): p for f in (studies / "labels" / "final", tmp_path / "studies_truth") for p in f.iterdir()}
    scans = {read_image(p).array.tobytes(): case_id(p) for p in studies.glob("*.nii.gz")}

    def compute(kind: ModelKind, model: Any, given: CascadeInput, before: Any, settings: Settings) -> StageOutput:
        case = scans[given.load_native().array.tobytes()]
        labels = settings.label_set
        truth = read_image(truths[case]).array.astype(np.uint8)
        regions = labels.regions(given.grid.label_to_working(truth, labels)).astype(np.float32)
        if case == TOO_LARGE:
            regions[:] = 1
        if case == DISPUTED and kind != ModelKind.SSL:
            regions[:] = 0
        return StageOutput(regions)

    monkeypatch.setattr(pipeline, "compute", compute)
    return studies


@pytest.mark.usefixtures("quick")
def test_the_verdict_refuses_what_is_unlike_human_labels_or_disputed(
    known_masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: Counter[str] = Counter()
    file_digest = hashlib.file_digest

    def counted(file: Any, name: Any) -> Any:
        hashed[os.path.relpath(file.name, known_masks)] += 1
        return file_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    settings = tiny_settings(tmp_path, promote_threshold="0.8", promote_fraction=1)
    summary = run_round(known_masks, settings)
    inputs = [*known_masks.glob("*.nii.gz"), *(known_masks / "labels" / "final").glob("*.nii.gz")]
    # the report makes sure that the scan of which it has a picture is still the same
    expected = {os.path.relpath(p, known_masks): 1 for p in inputs} | {f"{PLAUSIBLE}.nii.gz": 2}
    assert expected.items() <= dict(hashed).items()

    assert summary["promoted"] == [PLAUSIBLE]
    scores = {s.case: s for s in Ledger(Paths(settings, known_masks).ledger).scores()}
    assert scores[PLAUSIBLE].details["reasons"] == []
    assert not any(scores[c].details["promote"] for c in (TOO_LARGE, DISPUTED))
    assert scores[TOO_LARGE].agreement == 1
    assert "volume" in " ".join(scores[TOO_LARGE].details["reasons"])
    assert "liver: agreement 0.000 below 0.8" in scores[DISPUTED].details["reasons"]
    decisions = summary["decisions"]
    assert (decisions[PLAUSIBLE]["agreement"], decisions[PLAUSIBLE]["reasons"]) == (1, [])
    assert [c for c, d in decisions.items() if d["promoted"]] == [PLAUSIBLE]
    assert decisions[DISPUTED]["per_label"]["liver"] == 0
    assert "liver: agreement 0.000 below 0.8" in decisions[DISPUTED]["reasons"]
    assert [k for k in label_hashes(known_masks) if "pseudo" in k] == [f"aslseg_pseudo/{PLAUSIBLE}.nii.gz"]
    # a refused mask is still shown to annotators
    assert (known_masks / "labels" / "original" / f"{TOO_LARGE}.nii.gz").exists()


@pytest.mark.usefixtures("quick")
def test_networks_that_are_wrong_together_promote_nothing_and_a_first_model_says_how_poor_it_is(
    known_masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipeline.compute

    def mirrored(*given: Any) -> StageOutput:
        return StageOutput(right(*given).regions[:, ::-1].copy())

    monkeypatch.setattr(pipeline, "compute", mirrored)
    asked = {"promote_threshold": "0.8", "promote_fraction": 1, "label_folds": "auto"}
    summary = run_round(known_masks, tiny_settings(tmp_path, **asked, promote_floor="auto"))
    assert summary["agreement"][PLAUSIBLE] == 1
    assert summary["promoted"] == []
    liver = summary["evidence"]["liver"]
    assert (liver["cases"], liver["floor"], liver["dice"] < 0.5) == (3, 0.8, True)
    reason = f"liver: Dice {liver['dice']:.2f} on 3 human labels that were not trained on, floor 0.8 (promote_floor)"
    assert summary["decisions"][PLAUSIBLE]["reasons"] == [reason]
    ledger = Ledger(Paths(tiny_settings(tmp_path), known_masks).ledger)
    assert reason in why_nothing(ledger.rounds()[-1])
    for kind, line in zip(("ssl", "sam", "adapter"), summary["published"], strict=True):
        assert line.startswith(f"{kind}: published, the first one (Dice ")
        # each stage's own
        assert re.search(r"; Dice on human labels that were not trained on: liver 0\.[0-4]\d on [123], tumour", line)
        assert [w for w in summary["warnings"] if w.startswith(f"the first {kind} model is published, but liver has")]
    page = (Paths(tiny_settings(tmp_path), known_masks).reports / "round-1.html").read_text()
    assert "the first ssl model is published, but liver has Dice" in page
    # a ranking between two rounds goes by the same floors
    (score,) = (s for s in ledger.scores() if s.case == PLAUSIBLE)
    assert score.details["reasons"] == [reason]


def test_a_changed_scan_is_hashed_again(tmp_path: Path) -> None:
    from aslseg.files import FileHashes

    path, hashes = tmp_path / "scan", FileHashes()
    path.write_bytes(b"one")
    first = hashes(path)
    assert hashes(path) == first == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two, longer")
    assert hashes(path) == hashlib.sha256(b"two, longer").hexdigest()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        hashes(path)


@pytest.mark.parametrize("number", [None, 1])
def test_labels_are_recorded_by_a_round_on_a_studies_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    # a working folder that looks like a studies folder
    monkeypatch.chdir(tiny_studies(tmp_path, cases=1, labelled=1))
    settings = tiny_settings(tmp_path)
    paths = Paths(settings, "https://pacs.example/dicom-web" if number else tmp_path / "studies")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    found = RoundPipeline(paths, settings, ledger, RoundCases(None), Progress(tmp_path / "p.json", {}), number)
    with pytest.raises(LedgerError, match="run one with --studies DIR"):
        promotion.record(found, ORIGINAL, {})
    assert ledger.events() == []


@pytest.mark.parametrize(("stopped", "held"), [(False, True), (True, True), (True, False)])
def test_where_a_canary_stops_a_label_no_older_mask_that_holds_it_stays(
    monkeypatch: pytest.MonkeyPatch, stopped: bool, held: bool
) -> None:
    """The verdict has asked whether the new mask holds the label, not the old one."""
    monkeypatch.setattr(recipe, "promotion_details", lambda *_: {"sha256": "new"})
    old = {"sha256": "old", "agreement": {"liver": 0.9}}
    pipeline: Any = SimpleNamespace(
        cases=SimpleNamespace(unlabelled=[SimpleNamespace(id="a")], unlike={}),
        labels=Labels.parse("liver"),
        settings=SimpleNamespace(promote_fraction=1, promote_cases=0, promote_empty=1, thresholds={"liver": 0.5}),
        still_promoted=lambda: {"a": old},
        kept=lambda digest: np.full((2, 2, 2), float(held and digest == "old")),
    )
    maps: Any = lambda _: np.zeros((2, 2, 2))  # noqa: E731
    state = RoundState(pipeline, maps, maps, maps, "ssl", maps)
    monkeypatch.setattr(RoundState, "promises", Promises({}, 0.9, {}, {}))
    monkeypatch.setattr(RoundState, "differs", lambda *_: None)
    state.assessments["a"] = CaseAssessment(Agreement({"liver": 0.9}, 0.9), Verdict(True))
    state.stops = [Stop("liver", True, "canary")] if stopped else []
    assert recipe.promotable(state, no_progress)["a"]["sha256"] == ("new" if stopped and held else "old")
