"""What a round's retraining learns from: promoted masks, weighed by voxel, and never a label of an unlabelled scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.cases.prepared_case import Prepared
from aslseg.models.cascade import StageOutput
from aslseg.rounds import pipeline, run
from aslseg.rounds.artefacts import confidence
from aslseg.rounds.run import run_round
from tiny_rounds import label_hashes, published_hashes, tiny_settings, tiny_studies


def test_confidence_is_that_of_the_least_certain_region() -> None:
    regions = np.array([[0.5, 0.9, 1.0], [0.0, 0.4, 1.0]], np.float32)[:, :, None, None]
    np.testing.assert_allclose(confidence(regions).ravel(), [0, 0.2, 1], atol=1e-6)


@pytest.mark.usefixtures("plausible")
@pytest.mark.parametrize(
    ("retraining", "weights", "started"),
    [
        ({}, (1.0, 1.0), ["", "ssl.safetensors"]),
        ({"retrain_from": "scratch", "uncertainty_weight": 0.1}, (0.1, 0.1 + 0.9 * 0.8), ["", ""]),
    ],
)
def test_where_retraining_starts_and_how_voxels_weigh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retraining: Any, weights: tuple[float, float], started: list[str]
) -> None:
    def compute(kind: Any, model: Any, given: Any, *_: Any) -> StageOutput:
        """p = 0.9 in the upper half, p = 0.5 below."""
        regions = np.full((2, *given.image.shape), 0.5, np.float32)
        regions[:, :, :, given.image.shape[2] // 2 :] = 0.9
        return StageOutput(regions)

    trainings: list[tuple[str, list[Prepared]]] = []
    train = pipeline.training.train

    def watched(labelled: list[Prepared], *rest: Any, init: Path | None, **more: Any) -> Any:
        trainings.append((init.name if init else "", [c for c in labelled if c.voxel_weight is not None]))
        return train(labelled, *rest, init=init, **more)

    monkeypatch.setattr(pipeline, "compute", compute)
    monkeypatch.setattr(pipeline.training, "train", watched)
    settings = tiny_settings(tmp_path, promote_fraction=1, promote_empty=1, validation_fraction=0, **retraining)
    summary = run_round(tiny_studies(tmp_path, cases=4, labelled=2), settings)
    assert [init for init, _ in trainings] == started
    assert [len(cases) for _, cases in trainings] == [0, len(summary["promoted"])] == [0, 2]
    for case in trainings[1][1]:
        middle = case.image.shape[2] // 2
        assert case.voxel_weight is not None
        assert case.weight == settings.promote_weight
        for part, expected in zip(
            (case.voxel_weight[..., :middle], case.voxel_weight[..., middle:]), weights, strict=True
        ):
            np.testing.assert_allclose(part.astype(np.float32), expected, atol=0.01)


@pytest.mark.usefixtures("plausible")
def test_poisoned_labels_of_unlabelled_scans_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = run.prepare_cases

    def poisoned(*arguments: Any) -> Any:
        cases = prepare(*arguments)
        for group in (cases.unlabelled, cases.predict_only):
            group[:] = [replace(c, label=np.full(c.image.shape, np.nan, np.float32)) for c in group]
        assert cases.unlabelled
        assert cases.predict_only
        return cases

    found = []
    for name, preparation in (("clean", prepare), ("poisoned", poisoned)):
        root = tmp_path / name
        root.mkdir()
        studies, settings = tiny_studies(root), tiny_settings(root, promote_fraction=1, promote_empty=1)
        (studies / "patients.csv").write_text("case,patient,role\nphantom_000,P,validation\nphantom_005,P,\n")
        monkeypatch.setattr(run, "prepare_cases", preparation)
        summary = run_round(studies, settings)
        assert summary["promoted"] + summary["withdrawn"] == ["phantom_003", "phantom_004"]
        found.append((label_hashes(studies), published_hashes(settings, studies), summary["agreement"]))
    assert found[0] == found[1]
