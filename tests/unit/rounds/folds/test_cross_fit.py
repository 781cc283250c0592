"""Folds by patient, out-of-fold Dice in the summary, and the ensemble as a source of masks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.adaptation.faults import Faults
from aslseg.files import sha256
from aslseg.review.page import render
from aslseg.review.status import collect
from aslseg.rounds.folds.cross_fit import cross_fit, folds
from aslseg.rounds.folds.real_errors import learned_faults
from aslseg.rounds.promotion.state import RoundState
from aslseg.rounds.recipes import aslseg
from aslseg.rounds.run import run_round
from aslseg.rounds.steps import pipeline
from aslseg.settings import Paths, Settings
from aslseg.ssl import training
from aslseg.types import no_progress
from tiny_rounds import label_hashes, published_hashes, tiny_settings, tiny_studies

PATIENTS = (
    "case,patient,role\nphantom_000,a,train\nphantom_001,a,train\nphantom_002,b,train\nphantom_003,c,validation\n"
)


@pytest.mark.parametrize(
    ("patients", "count", "sizes"),
    [
        ("abcd", 4, [1, 1, 1, 1]),
        ("abcd", 9, [1, 1, 1, 1]),
        ("abcde", 2, [3, 2]),
        ("aab", 2, [2, 1]),
        ("aa", 4, []),
        ("", 2, []),
    ],
)
def test_folds_are_whole_patients_and_hold_every_case_once(patients: str, count: int, sizes: list[int]) -> None:
    cases: Any = [SimpleNamespace(id=n, patient=p) for n, p in enumerate(patients)]
    parts = folds(cases, count)
    assert sorted(map(len, parts), reverse=True) == sizes
    for n, part in enumerate(parts):
        others = {c.patient for m, other in enumerate(parts) if m != n for c in other}
        assert not others & {c.patient for c in part}
    assert sorted(c.id for part in parts for c in part) == (list(range(len(patients))) if sizes else [])
    assert folds(cases[::-1], count) == [part[::-1] for part in parts]


@pytest.mark.usefixtures("plausible")
def test_every_label_is_scored_by_a_model_that_has_not_seen_its_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings = tiny_studies(tmp_path, cases=5, labelled=4), tiny_settings(tmp_path, label_folds=4)
    (studies / "patients.csv").write_text(f"{PATIENTS}phantom_004,b,train\n")
    trained: list[tuple[set[str], set[str]]] = []
    train = training.train

    def watched(labelled: Any, unlabelled: Any, *rest: Any, **more: Any) -> Any:
        trained.append(({c.id for c in labelled}, {c.id for c in unlabelled}))
        return train(labelled, unlabelled, *rest, **more)

    monkeypatch.setattr(training, "train", watched)
    # as if the ensemble had been best
    monkeypatch.setattr(aslseg, "choose_source", lambda *_: "ensemble")
    summary = run_round(studies, settings)
    # patient b has an unlabelled scan too
    assert sorted(map(sorted, (labelled for labelled, _ in trained[1:3]))) == [
        ["phantom_000", "phantom_001"],
        ["phantom_002"],
    ]
    assert [unlabelled for _, unlabelled in trained[:3]] == [
        {"phantom_004"},
        *({"phantom_004"} if "phantom_002" in labelled else set() for labelled, _ in trained[1:3]),
    ]
    found = summary["out_of_fold"]
    assert found["folds"] == 2
    assert list(found["cases"]) == ["phantom_000", "phantom_001", "phantom_002"]
    assert all(0 <= dice <= 1 for case in found["cases"].values() for dice in case.values())
    livers = [case["liver"] for case in found["cases"].values()]
    assert found["dice"]["liver"] == pytest.approx(sum(livers) / 3)
    assert summary["source"] == "ensemble"
    assert set(summary["validation"]) >= {"ssl", "adapter", "consensus", "ensemble"}
    assert set(summary["cross_fitted"]) == {"ssl", "adapter", "consensus", "sam", "ensemble"}
    assert set(summary["sources"].values()) == {"ensemble"}
    page = render(collect(settings, Paths(settings, studies), {"total": 5, "completed": 4, "label_tags": {}}))
    assert f'<td class="n">liver {found["dice"]["liver"]:.3f}, ' in page
    # three labels by cross-fitting and the validation case
    assert summary["evidence"]["liver"]["cases"] == 4
    assert {"folds", "score"} <= set(summary["seconds"])
    (folder,) = (Paths(settings, studies).rounds / "steps").glob("ensemble-*")
    assert len(json.loads((folder / "inputs.json").read_text())["members"]) == 3
    assert {p.name[:11] for p in folder.glob("*.npz")} >= set(summary["promoted"])


@pytest.mark.usefixtures("plausible")
def test_sam_and_adapter_learn_masks_of_every_other_fold_and_are_judged_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real errors beside synthetic ones that are as severe; who has learned a mask says nothing of masks like it."""
    studies, settings = tiny_studies(tmp_path, cases=6, labelled=4), tiny_settings(tmp_path, label_folds=4)
    late = (studies / "phantom_005.nii.gz").rename(tmp_path / "phantom_005.nii.gz")
    (studies / "patients.csv").write_text(PATIENTS)
    given: list[Any] = []
    for module, name in ((pipeline.finetune, "errors"), (pipeline.adapter_train, "faults")):
        train = module.train

        def watched(*rest: Any, train: Any = train, name: str = name, **more: Any) -> Any:
            given.append(more[name])
            return train(*rest, **more)

        monkeypatch.setattr(module, "train", watched)
    states: list[RoundState] = []
    conclude = aslseg.conclude
    monkeypatch.setattr(aslseg, "conclude", lambda state, *rest: states.append(state) or conclude(state, *rest))
    summary = run_round(studies, settings)

    sam, adapter = given
    assert sam is adapter
    state = states[0]
    assert state.crossed is not None
    assert len(state.crossed.folds) == 2
    learned = set(state.crossed.parts[1])
    assert set(sam.real) == learned
    for fold in state.crossed.folds[1:]:
        for case in fold.cases:
            np.testing.assert_array_equal(sam.real[case.id](case), fold.maps(case))
    assert dict(zip(state.pipeline.labels.names, sam.most, strict=True)) == summary["severities"]
    for one in state.evidence.scored:
        assert ("adapter" in one.dice) == (one.case not in learned)
        assert "ssl" in one.dice
        assert (one.agreement["liver"] is None) >= (one.case in learned)
    # the next night finds both, also one with a new scan, from which the models of the folds learn too
    given.clear()
    assert run_round(studies, settings)["severities"] == summary["severities"]
    late.rename(studies / late.name)
    assert run_round(studies, settings)["severities"] == summary["severities"]
    assert not given
    new, old = (states[n].crossed for n in (-1, 0))
    assert new is not None
    assert old is not None
    assert {f.model for f in new.folds}.isdisjoint(f.model for f in old.folds)
    # other labels do count
    pipe = states[-1].pipeline
    key = learned_faults(pipe, new).key
    pipe.cases.train = [replace(c, label_hash="other") for c in pipe.cases.train]
    assert learned_faults(pipe, new).key != key


@pytest.mark.usefixtures("plausible")
def test_a_round_promotes_from_the_best_source_where_the_mix_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings = tiny_studies(tmp_path, cases=5, labelled=4), tiny_settings(tmp_path, label_folds=4)
    (studies / "patients.csv").write_text(PATIENTS)
    monkeypatch.setattr(aslseg, "choose_sources", lambda *_: {"liver": "adapter", "tumour": "ssl"})
    monkeypatch.setattr(aslseg, "choose_source", lambda *_: "consensus")
    for kept, source, sources in ((False, "consensus", {"consensus"}), (True, "mixed", {"adapter", "ssl"})):
        monkeypatch.setattr(aslseg, "no_worse", lambda evidence, whole, kept=kept: kept and whole == "consensus")
        summary = run_round(studies, settings)
        assert summary["source"] == source
        assert set(summary["sources"].values()) == sources
        # what it was compared by
        assert {"mixed", "consensus"} <= summary["cross_fitted"].keys()


def test_without_folds_all_errors_are_synthetic() -> None:
    labels = Settings().label_set
    one: Any = SimpleNamespace(labels=labels)
    assert learned_faults(one, None) == Faults(labels)


def test_one_patient_gives_no_folds() -> None:
    cases = [SimpleNamespace(id=n, patient="a") for n in range(3)]
    one: Any = SimpleNamespace(cases=SimpleNamespace(train=cases), settings=Settings())
    assert one.settings.most_folds == 4
    assert cross_fit(one, no_progress) is None


class Killed(BaseException):
    """As by ``kill -9``: nothing catches it."""


@pytest.mark.usefixtures("plausible")
def test_a_round_killed_in_its_folds_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, train = {}, training.train
    for name, kills in (("whole", ()), ("killed", ("folds", "score"))):
        root = tmp_path / name
        root.mkdir()
        studies, settings = tiny_studies(root, cases=5, labelled=4), tiny_settings(root, label_folds="auto")
        (studies / "patients.csv").write_text(PATIENTS)
        for stage in kills:
            seen: list[str] = []

            def kill(done: int, total: int, where: str = stage, seen: list[str] = seen, **shown: Any) -> None:
                seen.append(shown["stage"])
                # in the second half of the stage
                if seen.count(where) > (8 if where == "folds" else 1):
                    raise Killed

            with pytest.raises(Killed):
                run_round(studies, settings, kill)
        trained: list[str] = []
        with monkeypatch.context() as patched:

            def watched(labelled: Any, *rest: Any, into: list[str] = trained, **more: Any) -> Any:
                into.append(str(sorted(c.id for c in labelled)))
                return train(labelled, *rest, **more)

            patched.setattr(training, "train", watched)
            summary = run_round(studies, settings)
        steps = Paths(settings, studies).rounds / "steps"
        ended[name] = (
            {k: summary[k] for k in ("out_of_fold", "evidence", "cross_fitted", "promoted", "decisions", "source")},
            label_hashes(studies),
            published_hashes(settings, studies),
            sorted(p.name for p in steps.iterdir()),
        )
        # after the last kill nothing but the retraining is left
        assert len(trained) == (4 if name == "whole" else 1)
    assert ended["killed"] == ended["whole"]


def test_folds_that_are_trained_at_a_time_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    found = []
    for at_once in (1, 2):
        root = tmp_path / str(at_once)
        root.mkdir()
        studies, settings = tiny_studies(root), tiny_settings(root, label_folds=2, folds_at_once=at_once)
        (studies / "patients.csv").write_text("case,patient,role\nphantom_000,P,validation\n")
        seen: list[tuple[int, int]] = []

        def end_behind_folds(done: int, total: int, seen: list[tuple[int, int]] = seen, **shown: Any) -> None:
            if shown.get("stage") == "folds":
                seen.append((done, total))
            elif seen:
                raise Killed

        with pytest.raises(Killed):
            run_round(studies, settings, end_behind_folds)
        found.append(sorted(sha256(p) for p in Paths(settings, studies).rounds.glob("steps/ssl-*/ssl.safetensors")))
    assert found[0] == found[1]
    assert len(found[0]) == 3
