"""The recipes that ASLseg's is compared with, on the smallest phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.cases.prepared_case import Prepared
from aslseg.models.cascade import Cascade
from aslseg.models.kinds import ModelKind
from aslseg.rounds.run import run_round
from aslseg.settings import Paths
from aslseg.ssl import training
from aslseg.volume.io import read_image
from tiny_rounds import published_hashes, tiny_settings, tiny_studies

STEPS = {"ssl_iterations": 4, "retrain_iterations": 3, "sam_iterations": 2, "adapter_iterations": 2}
"""Two folds of four steps each: 4 + 8 + 3 + 2 + 2 = 19 in an ASLseg round."""
Learned = tuple[list[Prepared], str, int]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Learned]:
    """Labelled cases, SSL method and steps of each training of the SSL network."""
    seen: list[Learned] = []
    train = training.train

    def watched(labelled: Any, unlabelled: Any, settings: Any, *rest: Any, iterations: int, **more: Any) -> Any:
        seen.append((list(labelled), settings.ssl_method, iterations))
        return train(labelled, unlabelled, settings, *rest, iterations=iterations, **more)

    monkeypatch.setattr(training, "train", watched)
    return seen


@pytest.mark.usefixtures("plausible")
def test_self_training_learns_its_own_masks_for_the_steps_of_an_aslseg_round(
    tmp_path: Path, trained: list[Learned]
) -> None:
    studies = tiny_studies(tmp_path)
    settings = tiny_settings(tmp_path, recipe="self_training", label_folds=2, promote_floor="0", **STEPS)
    first = run_round(studies, settings)
    waiting = ["phantom_003", "phantom_004", "phantom_005"]
    assert first["promoted"] == waiting
    assert first["source"] == "ssl"
    assert [steps for _, _, steps in trained] == [4, 15]
    own = [c for c in trained[1][0] if c.voxel_weight is not None]
    assert [c.id for c in own] == waiting
    assert all((c.voxel_weight == 1).all() for c in own)
    model = Cascade.load({ModelKind.SSL: Path(first["models"]["ssl"])}, settings)
    for case in own:
        mask = read_image(studies / "labels" / "aslseg_pseudo" / f"{case.id}.nii.gz").array.astype(np.uint8)
        # kept probabilities have 8 bits
        assert np.mean(model.masks(read_image(studies / f"{case.id}.nii.gz"))[ModelKind.SSL] == mask) > 0.99
        np.testing.assert_array_equal(case.label, case.grid.label_to_working(mask, settings.label_set))
    assert set(published_hashes(settings, studies)) == {"ssl"}
    assert not {"folds", "sam", "redraw", "adapter", "refine"} & first["seconds"].keys()
    # a night without news trains nothing
    trained.clear()
    second = run_round(studies, settings)
    assert not trained
    assert second["models"] == first["models"]


@pytest.mark.usefixtures("plausible")
def test_self_training_uses_no_mask_that_misses_its_floor(tmp_path: Path, trained: list[Learned]) -> None:
    studies = tiny_studies(tmp_path)
    settings = tiny_settings(tmp_path, recipe="self_training", label_folds=0, promote_floor="1", **STEPS)
    assert run_round(studies, settings)["promoted"] == []
    assert len(trained) == 1


@pytest.mark.usefixtures("plausible")
def test_supervised_learns_human_labels_for_the_steps_of_an_aslseg_round(
    tmp_path: Path, trained: list[Learned]
) -> None:
    studies = tiny_studies(tmp_path)
    settings = tiny_settings(tmp_path, recipe="supervised", label_folds=2, promote_floor="0", **STEPS)
    summary = run_round(studies, settings)
    assert summary["promoted"] == []
    assert [(method, steps) for _, method, steps in trained] == [("supervised", 19)]
    assert all(c.voxel_weight is None for c in trained[0][0])
    assert summary["models"]["retrained"] == summary["models"]["ssl"]
    assert set(published_hashes(settings, studies)) == {"ssl"}
    assert not list((Paths(settings, studies).rounds / "steps").glob("sam-*"))
