"""What a round's retraining learns from: promoted masks, weighed by voxel, and never a label of an unlabelled scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from aslseg.cases.prepared_case import Prepared
from aslseg.files import sha256
from aslseg.models.cascade import StageOutput
from aslseg.review.report import collect
from aslseg.rounds import run
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion.state import RoundState
from aslseg.rounds.run import run_round
from aslseg.rounds.steps import pipeline
from aslseg.rounds.steps.artefacts import ArtefactStore, confidence
from aslseg.rounds.steps.promoted import promoted_case
from aslseg.settings import Paths
from aslseg.ssl import training
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
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
    train = training.train

    def watched(labelled: list[Prepared], *rest: Any, init: Path | None, **more: Any) -> Any:
        trainings.append((init.name if init else "", [c for c in labelled if c.voxel_weight is not None]))
        return train(labelled, *rest, init=init, **more)

    monkeypatch.setattr(pipeline, "compute", compute)
    monkeypatch.setattr(training, "train", watched)
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


def test_voxels_on_which_the_networks_disagree_weigh_less(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, disagreement_weight=0.3)
    labels, shape = settings.label_set, (4, 5, 6)
    case = Prepared("a", "a", np.zeros(shape, np.float32), Grid.of(Volume(np.zeros(shape), np.eye(4)), None))
    first, second = (np.zeros((len(labels), *shape), np.float32) for _ in range(2))
    first[0] = second[0] = 0.9
    second[0, :, :2] = 0.2
    state: Any = SimpleNamespace(
        pipeline=SimpleNamespace(labels=labels, decode=labels.decode),
        floors=SimpleNamespace(unknown=()),
        ssl_maps=lambda _: first,
        second_maps=lambda _: second,
    )
    differ = RoundState.differs(state, case)
    assert differ[:, :2].all()
    assert not differ[:, 2:].any()
    files = {"disagreement": differ, "mask": labels.decode(first)}
    details = {"image": "image", "sha256": "mask", "disagreement": "disagreement"}
    learned = promoted_case(case, details, settings, None, ArtefactStore(tmp_path), files.__getitem__).case
    assert learned.voxel_weight is not None
    np.testing.assert_allclose(learned.voxel_weight, np.where(differ, 0.3, 1), atol=0.001)


TIMES = ("seconds", "measured", "rates", "ledger", "models", "inputs")
"""Of a summary, what two equal rounds in two folders do not share."""


@pytest.mark.usefixtures("plausible")
def test_poisoned_labels_of_unlabelled_scans_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through two rounds of two stages: folds, ensemble, verdicts, canaries, promotion, drift, retraining and gate."""
    prepare, rng = run.prepare_cases, np.random.default_rng(0)

    def poison(number: int, shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(0, 255, shape).astype(np.uint8) if number % 2 else np.full(shape, np.nan, np.float32)

    def poisoned(*arguments: Any) -> Any:
        cases = prepare(*arguments)
        for group in (cases.unlabelled, cases.predict_only):
            group[:] = [replace(c, label=poison(n, c.image.shape)) for n, c in enumerate(group)]
        assert [len(group) for group in (cases.unlabelled, cases.predict_only)] == [2, 1]
        # and files of a tag that is none of ours
        (root / "studies" / "labels" / "draft").mkdir(exist_ok=True)
        for n, case in enumerate((*cases.unlabelled, *cases.predict_only)):
            path = root / "studies" / "labels" / "draft" / f"{case.id}.nii.gz"
            nib.save(nib.Nifti1Image(poison(n, case.grid.native_shape), case.grid.affine), path)
        return cases

    found = []
    for name, preparation in (("clean", prepare), ("poisoned", poisoned)):
        root = tmp_path / name
        root.mkdir()
        studies = tiny_studies(root)
        settings = tiny_settings(root, promote_fraction=1, promote_empty=1, label_folds=2, nested_fraction=0.5)
        (studies / "patients.csv").write_text("case,patient,role\nphantom_000,P,validation\nphantom_005,P,\n")
        monkeypatch.setattr(run, "prepare_cases", preparation)
        summaries, trained = [], []
        for _ in range(2):
            summaries.append(run_round(studies, settings))
            steps = Paths(settings, studies).rounds / "steps"
            trained.append(sorted(path.parent.name for path in steps.glob("*/*.safetensors")))
        assert trained[0] == trained[1], "a second night without new labels or masks trains nothing"
        assert summaries[0]["promoted"] + summaries[0]["withdrawn"] == ["phantom_003", "phantom_004"]
        assert summaries[0]["out_of_fold"]["folds"] == 2
        assert summaries[0]["canaries"]["cases"]
        paths = Paths(settings, studies)
        reported = collect(paths, settings, Ledger(paths.ledger).rounds()[-1])
        decided = [{k: v for k, v in s.items() if k not in TIMES} for s in summaries]
        shown = {k: v for k, v in reported.items() if k not in (*TIMES, "opened", "closed", "written", "computed")}
        models = [{kind: sha256(Path(path)) for kind, path in s["models"].items()} for s in summaries]
        labels = {name: digest for name, digest in label_hashes(studies).items() if not name.startswith("draft/")}
        found.append((labels, published_hashes(settings, studies), models, decided, shown))
    assert found[0] == found[1]
