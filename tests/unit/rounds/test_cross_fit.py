"""Folds by patient, out-of-fold Dice in the summary, and the ensemble as a source of masks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.errors import TrainingDivergedError
from aslseg.rounds import pipeline
from aslseg.rounds.cross_fit import cross_fit, folds
from aslseg.rounds.recipes import aslseg
from aslseg.rounds.run import run_round
from aslseg.settings import Paths
from aslseg.types import Labels, no_progress
from tiny_rounds import tiny_settings, tiny_studies

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
    (studies / "patients.csv").write_text(PATIENTS)
    trained: list[set[str]] = []
    train = pipeline.training.train

    def watched(labelled: Any, *rest: Any, **more: Any) -> Any:
        trained.append({c.id for c in labelled})
        return train(labelled, *rest, **more)

    def ensemble(found: Any, candidates: Any) -> Any:
        """As if the ensemble had validated best."""
        return "ensemble", {name: found.dice(maps) for name, maps in candidates.items()}

    monkeypatch.setattr(pipeline.training, "train", watched)
    monkeypatch.setattr(aslseg, "choose_source", ensemble)
    summary = run_round(studies, settings)
    assert {frozenset(t) for t in trained[1:3]} == {
        frozenset({"phantom_000", "phantom_001"}),
        frozenset({"phantom_002"}),
    }
    found = summary["out_of_fold"]
    assert found["folds"] == 2
    assert list(found["cases"]) == ["phantom_000", "phantom_001", "phantom_002"]
    assert all(0 <= dice <= 1 for case in found["cases"].values() for dice in case.values())
    livers = [case["liver"] for case in found["cases"].values()]
    assert found["dice"]["liver"] == pytest.approx(sum(livers) / 3)
    assert summary["source"] == "ensemble"
    assert set(summary["validation"]) >= {"ssl", "adapter", "consensus", "ensemble"}
    (folder,) = (Paths(settings, studies).rounds / "steps").glob("ensemble-*")
    assert len(json.loads((folder / "inputs.json").read_text())["members"]) == 3
    assert {p.name[:11] for p in folder.glob("*.npz")} >= set(summary["promoted"])


def test_a_fold_that_diverges_is_left_out_and_said() -> None:
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[:2] = 1
    cases = [SimpleNamespace(id=name, patient=name, label=truth) for name in "abc"]

    class Pipeline:
        """Trains nothing; the model without b diverges, the others are right."""

        settings = SimpleNamespace(label_folds=3)
        labels = Labels.parse("liver")
        decode = staticmethod(lambda regions: regions)

        def __init__(self) -> None:
            self.cases = SimpleNamespace(train=cases, warnings=[])

        def train_ssl(self, promoted: Any, report: Any, without: Any) -> Path:
            if "b" in without:
                raise TrainingDivergedError("loss became nan at step 3")
            return Path("model")

        def predict(self, kind: Any, models: Any) -> Any:
            return lambda case: truth

    some: Any = Pipeline()
    found = cross_fit(some, no_progress)
    assert found is not None
    assert (sorted(found.cases), len(found.maps), found.dice) == (["a", "c"], 2, {"liver": 1.0})
    assert some.cases.warnings == ["the training without b is left out of cross-fitting: loss became nan at step 3"]
    some.cases.train = [c for c in cases if c.id != "a"]
    some.settings = SimpleNamespace(label_folds=2)
    some.train_ssl = lambda *_, **__: (_ for _ in ()).throw(TrainingDivergedError("no"))
    assert cross_fit(some, no_progress) is None


def test_one_patient_gives_no_folds() -> None:
    cases = [SimpleNamespace(id=n, patient="a") for n in range(3)]
    one: Any = SimpleNamespace(cases=SimpleNamespace(train=cases), settings=SimpleNamespace(label_folds=4))
    assert cross_fit(one, no_progress) is None
