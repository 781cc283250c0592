"""Limits on components of nested labels: published models have those of all folds, a fold those of the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.compute.weights import read_metadata
from aslseg.files import sha256
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds import component_limits, cross_retrain
from aslseg.rounds.folds.cross_fit import region_dice
from aslseg.rounds.promotion.state import RoundState
from aslseg.rounds.recipes import aslseg
from aslseg.rounds.run import run_round, train_stage
from aslseg.rounds.steps import pipeline
from aslseg.settings import Paths, Settings
from aslseg.ssl import nested, specks, training
from aslseg.ssl.synthetic_lesions import COPY
from aslseg.types import Labels, no_progress
from tiny_rounds import published_hashes, tiny_settings, tiny_studies

PATIENTS = (
    "case,patient,role\nphantom_000,a,train\nphantom_001,b,train\nphantom_002,c,train\nphantom_003,d,validation\n"
)


def models(root: Path, settings: Any, studies: Path) -> list[dict[str, Any]]:
    """Metadata of all SSL models that the round has made."""
    files = (Paths(settings, studies).rounds / "steps").glob("ssl-*/ssl.safetensors")
    return [read_metadata(path) for path in files]


def check_folds(state: RoundState, fitted: bool) -> None:
    """The limits of a fold come from the other folds' patients, and its masks are judged with them."""
    assert state.crossed is not None
    assert len(state.crossed.folds) == 2
    for fold in state.crossed.folds:
        others = {"a", "b", "c"} - {c.patient for c in fold.cases}
        limits = {"tumour": {"probability": 0.8, "mm3": 10.0 * sum(map(ord, others))}} if fitted else {}
        assert read_metadata(fold.model).get("specks", {}) == fold.limits == limits
        maps = state.pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: fold.model}))
        assert maps.folder == fold.maps.folder
        for case in fold.cases:
            assert state.crossed.cases[case.id] == region_dice(state.pipeline, maps, case)
            (scored,) = (one for one in state.evidence.scored if one.case == case.id)
            assert scored.dice["ssl"] == state.crossed.cases[case.id]
    # models that are retrained without a fold, to compare promotions, have its limits too
    limited: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_retrain, "limited", lambda _, fold, model: limited.append(fold.limits) or model)
        cross_retrain.retrained_dice(
            state.pipeline, state.crossed, [c.id for c in state.pipeline.cases.unlabelled], no_progress
        )
    assert limited == [fold.limits for fold in state.crossed.folds]


@pytest.mark.usefixtures("plausible")
@pytest.mark.parametrize("fitted", [True, False])
def test_the_published_model_has_the_limits_that_the_folds_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted: bool
) -> None:
    studies = tiny_studies(tmp_path, cases=5, labelled=4)
    settings = tiny_settings(tmp_path, label_folds=2, nested_fraction=0.5)
    (studies / "patients.csv").write_text(PATIENTS)
    fits: list[set[str]] = []

    def fit(found: list[specks.Scan]) -> specks.Limits | None:
        fits.append({s.patient for s in found})
        # each set of patients has limits of its own
        return specks.Limits(0.8, 10.0 * sum(map(ord, fits[-1]))) if fitted else None

    monkeypatch.setattr(specks, "fit", fit)
    states: list[RoundState] = []
    conclude = aslseg.conclude
    monkeypatch.setattr(aslseg, "conclude", lambda state, *rest: states.append(state) or conclude(state, *rest))
    learned: dict[str, set[str]] = {}
    for name, module in (("sam", pipeline.finetune), ("adapter", pipeline.adapter_train)):
        train = module.train

        def watched(cases: Any, *rest: Any, name: str = name, train: Any = train, **more: Any) -> Any:
            learned[name] = {c.id for c in cases}
            return train(cases, *rest, **more)

        monkeypatch.setattr(module, "train", watched)
    summary = run_round(studies, settings)
    human = {"phantom_000", "phantom_001", "phantom_002"}
    for name in ("sam", "adapter"):
        # the stages after it see nested labels as it does, and learn from synthetic lesions
        assert learned[name] == human | {f"{case}{COPY}" for case in human}
        assert read_metadata(Path(summary["models"][name]))["relative"] == settings.nested_range
    assert fits[0] == {"a", "b", "c"}
    known = models(tmp_path, settings, studies)
    # the model of all labels, and the retrained one where anything was promoted; two folds without
    assert sum("specks" not in m for m in known) >= 3
    assert any("specks" in m for m in known) is fitted
    expected = {"tumour": {"probability": 0.8, "mm3": 10.0 * sum(map(ord, "abc"))}} if fitted else {}
    (state,) = states
    check_folds(state, fitted)
    for name in ("ssl", "retrained"):
        assert read_metadata(Path(summary["models"][name])).get("specks", {}) == expected
    assert run_round(studies, settings)["models"] == summary["models"]


def test_limits_are_fitted_in_the_units_in_which_prediction_measures() -> None:
    """Scans that keep their own voxels have no size in prediction: a component of 8 voxels has 8 there and here."""
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:7, 1:7, 1:7] = 1
    label[2:4, 2:4, 2:4] = 2
    labels = Labels.parse("liver,tumour", "tumour:liver")
    case: Any = SimpleNamespace(patient="a", label=label, grid=SimpleNamespace(spacing=(0.5, 0.5, 2.0)))
    fold: Any = SimpleNamespace(cases=[case], maps=lambda one: labels.regions(one.label).astype(np.float32))
    for spacing, mm3 in ((None, 8.0), ((2.0, 2.0, 1.0), 32.0)):
        one: Any = SimpleNamespace(labels=labels, cases=SimpleNamespace(spacing=spacing))
        (scan,) = component_limits._scans(one, fold)["tumour"]
        assert scan.mm3.tolist() == [mm3]
        working = nested.geometry([], nested.branches(labels)[0], Settings(), spacing).working
        p = np.stack([label == n for n in range(3)]).astype(np.float32)
        assert specks.clear(p, labels, {"tumour": {"probability": 0.0, "mm3": mm3}}, working) == 0
        assert specks.clear(p, labels, {"tumour": {"probability": 0.0, "mm3": mm3 + 1}}, working) == 1


@pytest.mark.usefixtures("plausible")
def test_a_model_of_one_stage_has_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = tiny_studies(tmp_path, cases=5, labelled=4)
    settings = tiny_settings(tmp_path, label_folds=2)
    (studies / "patients.csv").write_text(PATIENTS)
    monkeypatch.setattr(specks, "fit", lambda scans: specks.Limits(0.8, 30.0))
    run_round(studies, settings)
    assert not any("specks" in m for m in models(tmp_path, settings, studies))


@pytest.mark.usefixtures("plausible")
def test_a_single_training_makes_what_a_round_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits for the SSL model, errors of the folds for SAM and the adaptation network."""
    studies = tiny_studies(tmp_path, cases=5, labelled=4)
    settings = tiny_settings(tmp_path, label_folds=2, nested_fraction=0.5)
    (studies / "patients.csv").write_text(PATIENTS)
    monkeypatch.setattr(specks, "fit", lambda scans: specks.Limits(0.8, 30.0))
    shown: list[str] = []
    train_stage("ssl", studies, settings, lambda done, total, **more: shown.append(more["stage"]))
    assert list(dict.fromkeys(shown)) == ["prepare", "fresh", "ssl", "folds", "publish"]
    (published,) = Paths(settings, studies).models.glob("ssl-*.safetensors")
    assert read_metadata(published)["specks"] == {"tumour": {"probability": 0.8, "mm3": 30.0}}
    train_stage("adapter", studies, settings)
    models = published_hashes(settings, studies)
    summary = run_round(studies, settings)
    for kind in ("ssl", "adapter"):
        assert sha256(Path(summary["models"][kind])) == models[kind]
    # the folds give nothing to a network of one stage
    trained: list[int] = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: trained.append(len(a[0])) or train(*a, **k))
    train_stage("ssl", studies, settings.model_copy(update={"nested_fraction": 0.0}))
    assert trained == [3]


@pytest.mark.usefixtures("plausible")
def test_a_control_has_no_limits(tmp_path: Path) -> None:
    studies, settings = tiny_studies(tmp_path), tiny_settings(tmp_path, nested_fraction=0.5, recipe="supervised")
    model = Path(run_round(studies, settings)["models"]["retrained"])
    assert "stages" in read_metadata(model)
    assert "specks" not in read_metadata(model)


@pytest.mark.usefixtures("plausible")
def test_without_folds_the_published_model_has_the_usual_limits(tmp_path: Path) -> None:
    studies, settings = tiny_studies(tmp_path), tiny_settings(tmp_path, nested_fraction=0.5)
    train_stage("ssl", studies, settings)
    (published,) = Paths(settings, studies).models.glob("ssl-*.safetensors")
    assert read_metadata(published)["specks"] == {"tumour": {"probability": 0.8, "mm3": 0.0}}
    before = published_hashes(settings, studies)
    assert sha256(Path(run_round(studies, settings)["models"]["ssl"])) == before["ssl"]
