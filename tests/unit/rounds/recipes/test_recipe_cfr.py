"""CFR's recipe on the smallest phantoms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.agreement.measures import Agreement
from aslseg.agreement.promotion_rules import Verdict
from aslseg.cases.prepared_case import Prepared, arrays, load_within_budget
from aslseg.compute.weights import read_metadata
from aslseg.models.cascade import Cascade
from aslseg.models.kinds import ModelKind
from aslseg.rounds.folds.evidence import Floors
from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.label_files.rollback import roll_back
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion.canaries import Stop
from aslseg.rounds.promotion.state import CaseAssessment, RoundState
from aslseg.rounds.recipes import cfr
from aslseg.rounds.run import run_round
from aslseg.rounds.scheduling.progress import read_progress
from aslseg.settings import Paths
from aslseg.ssl import training
from aslseg.types import Labels, no_progress
from aslseg.volume.io import read_image
from tiny_rounds import label_hashes, published_hashes, tiny_settings, tiny_studies


@pytest.mark.usefixtures("plausible")
def test_two_rounds_and_a_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = tiny_studies(tmp_path)
    train, learned = training.train, []

    def spied(labelled: list[Prepared], *rest: Any, **more: Any) -> dict[str, Any]:
        learned.append(labelled)
        return train(labelled, *rest, **more)

    monkeypatch.setattr(training, "train", spied)
    # a promotion that CFR ignores: it takes every scan
    settings = tiny_settings(tmp_path, recipe="cfr", sam_train="lora", promote_fraction=0.1, promote_threshold="1")
    paths = Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    human = {k: v for k, v in label_hashes(studies).items() if k.startswith("final/")}
    told: list[dict[str, Any]] = []
    first = run_round(studies, settings, lambda done, total, **shown: told.append({"part": done / total, **shown}))
    waiting = ["phantom_003", "phantom_004", "phantom_005"]
    assert first["promoted"] == waiting
    assert sorted(first["agreement"]) == waiting
    promoted = [c for c in learned[1] if c.voxel_weight is not None]
    assert [c.id for c in promoted] == waiting
    # so that training_memory_gb holds for them too
    assert all(isinstance(a, np.memmap) for c in load_within_budget(promoted, 0) for a in arrays(c).values())
    assert first["source"] == "canvas"
    assert set(first["validation"]) >= {"ssl", "canvas", "retrained", "published ssl"}
    after = label_hashes(studies)
    assert {k: v for k, v in after.items() if k.startswith("final/")} == human
    assert sorted(k for k in after if "pseudo" in k) == [f"aslseg_pseudo/{c}.nii.gz" for c in waiting]
    assert sorted(k for k in after if k.startswith("original/")) == [f"original/{c}.nii.gz" for c in waiting]
    assert set(published_hashes(settings, studies)) == {"ssl"}
    metadata = read_metadata(Path(first["models"]["canvas"]))
    assert (metadata["architecture"]["canvas"], metadata["architecture"]["masks"]) == (True, 2)
    assert [t["part"] for t in told] == sorted(t["part"] for t in told)
    assert {"ssl", "sam", "redraw", "retrain", "publish"} <= first["seconds"].keys()
    assert not {"adapter", "refine"} & first["seconds"].keys()
    assert read_progress(paths.home / "progress.json")["state"] == "done"
    assert all(set(p.models) == {"ssl", "canvas"} for p in ledger.promotions())

    volume = read_image(studies / "phantom_003.nii.gz")
    files = {ModelKind(k): Path(first["models"][k]) for k in ("ssl", "canvas")}
    masks = Cascade.load(files, settings).masks(volume)
    assert {k: v.shape for k, v in masks.items()} == dict.fromkeys(("ssl", "canvas"), volume.array.shape)

    second = run_round(studies, settings)
    for model in ("ssl", "canvas", "retrained"):  # the same human labels: nothing to train anew
        assert second["models"][model] == first["models"][model]
    assert label_hashes(studies) == after
    assert verify_label_files(paths) == []

    roll_back(paths, 2)
    roll_back(paths, 1)
    assert label_hashes(studies) == human


def test_alien_scans_and_masks_that_a_canary_stops_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cfr, "promotion_details", lambda state, case, *_: {"of": case.id})
    verdicts = {
        "alien": Verdict(False, ("unlike",)),
        "stopped": Verdict(False, ("liver: agreement 0.1 below 0.9", "canary x")),
        "poor": Verdict(False, ("liver: agreement 0.1 below 0.9",)),
    }
    scans = [SimpleNamespace(id=c, image=np.zeros((2, 2, 2))) for c in verdicts]
    cases = SimpleNamespace(unlabelled=scans, unlike={"alien": "unlike"})
    pipeline: Any = SimpleNamespace(cases=cases, labels=Labels.parse("liver"))
    nothing: Any = None
    state = RoundState(pipeline, nothing, nothing, nothing, "canvas", nothing)
    state.stops = [Stop("liver", True, "canary x")]
    for case, verdict in verdicts.items():
        state.assessments[case] = CaseAssessment(Agreement({"liver": 0.1}, 0.1), verdict)
    assert cfr.promote_all(state, no_progress) == {"poor": {"of": "poor"}}, "agreement is not asked"
    assert state.refused == {"alien": ["unlike"], "stopped": ["canary x"]}


def test_an_earlier_mask_that_taught_too_much_does_not_bar_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cfr, "promotion_details", lambda state, case, *_: {"of": case.id})
    earlier = SimpleNamespace(kind="mask", details={"sha256": "x"})
    cases = SimpleNamespace(unlabelled=[SimpleNamespace(id="a", image=np.zeros((2, 2, 2)))], unlike={})
    ledger = SimpleNamespace(masks=lambda tag, before=None: {"a": earlier})
    pipeline: Any = SimpleNamespace(cases=cases, labels=Labels.parse("liver"), ledger=ledger, opened=5)
    nothing: Any = None
    state = RoundState(pipeline, nothing, nothing, nothing, "canvas", nothing)
    state.floors = Floors({"tumour": "tumour: Dice 0.30, floor 0.5"}, ("tumour",))
    state.assessments["a"] = CaseAssessment(Agreement({"liver": 0.9}, 0.9), Verdict(True))
    assert cfr.promote_all(state, no_progress) == {"a": {"of": "a"}}, "the new mask leaves the tumour open"
    assert not state.refused
    # the earlier one does not come back, should the new model be rejected
    assert state.barred("a") == ("it teaches tumour (tumour: Dice 0.30, floor 0.5)",)
