"""Limits on components of nested labels: from the folds' masks, into the published model, never into a fold's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aslseg.compute.weights import read_metadata
from aslseg.rounds import pipeline
from aslseg.rounds.run import run_round
from aslseg.settings import Paths
from aslseg.ssl import specks
from tiny_rounds import tiny_settings, tiny_studies

PATIENTS = (
    "case,patient,role\nphantom_000,a,train\nphantom_001,b,train\nphantom_002,c,train\nphantom_003,d,validation\n"
)


def models(root: Path, settings: Any, studies: Path) -> list[dict[str, Any]]:
    """Metadata of all SSL models that the round has made."""
    files = (Paths(settings, studies).rounds / "steps").glob("ssl-*/ssl.safetensors")
    return [read_metadata(path) for path in files]


@pytest.mark.usefixtures("plausible")
@pytest.mark.parametrize("fitted", [True, False])
def test_the_published_model_has_the_limits_that_the_folds_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted: bool
) -> None:
    studies = tiny_studies(tmp_path, cases=5, labelled=4)
    settings = tiny_settings(tmp_path, label_folds=2, nested_fraction=0.5)
    (studies / "patients.csv").write_text(PATIENTS)
    scans: list[specks.Scan] = []

    def fit(found: list[specks.Scan]) -> specks.Limits | None:
        scans.extend(found)
        return specks.Limits(0.8, 30.0) if fitted else None

    monkeypatch.setattr(specks, "fit", fit)
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
        assert learned[name] == human | {f"{case}-synthetic" for case in human}
        assert read_metadata(Path(summary["models"][name]))["relative"] == settings.nested_range
    assert {s.patient for s in scans} == {"a", "b", "c"}
    with_limits = [m for m in models(tmp_path, settings, studies) if "specks" in m]
    without = [m for m in models(tmp_path, settings, studies) if "specks" not in m]
    # the model of all labels, and the retrained one where anything was promoted; two folds without
    assert len(without) >= 3
    assert bool(with_limits) is fitted
    assert all(m["specks"] == {"tumour": {"probability": 0.8, "mm3": 30.0}} for m in with_limits)
    for name in ("ssl", "retrained"):
        assert ("specks" in read_metadata(Path(summary["models"][name]))) is fitted
    assert run_round(studies, settings)["models"] == summary["models"]


@pytest.mark.usefixtures("plausible")
def test_a_model_of_one_stage_has_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = tiny_studies(tmp_path, cases=5, labelled=4)
    settings = tiny_settings(tmp_path, label_folds=2)
    (studies / "patients.csv").write_text(PATIENTS)
    monkeypatch.setattr(specks, "fit", lambda scans: specks.Limits(0.8, 30.0))
    run_round(studies, settings)
    assert not any("specks" in m for m in models(tmp_path, settings, studies))
