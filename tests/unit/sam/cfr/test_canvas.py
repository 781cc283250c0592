"""SAM on stitched canvases: training, prediction, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.weights import read_metadata
from aslseg.errors import BadSettingsError, BadWeightsError, NotEnoughCasesError
from aslseg.sam.cfr import canvas
from aslseg.sam.cfr.stitch import Layout
from aslseg.sam.modeling.build import SAMModel, load
from aslseg.settings import Settings


@pytest.fixture
def small(ball_case: Callable[..., Prepared]) -> Prepared:
    """Three slices of 20 x 16 pixels; 3 x 4 tiles on a canvas of 64."""
    case = ball_case(tumour=False)
    return replace(case, image=case.image[6:26, 6:22, 1:4], label=case.label[6:26, 6:22, 1:4])


def test_new_tokens_and_otherwise_the_same_weights(tiny: SAMModel) -> None:
    model = canvas.for_canvases(tiny, 2, seed=1)
    assert model.architecture == replace(tiny.architecture, masks=2, canvas=True)
    before, after = tiny.sam.state_dict(), model.sam.state_dict()
    assert after["mask_decoder.mask_tokens.weight"].shape == (3, 32)
    for key, value in before.items():
        assert key.startswith(canvas.NEW) or torch.equal(after[key], value), key
    again = canvas.for_canvases(tiny, 2, seed=1).sam.state_dict()
    assert all(torch.equal(again[k], v) for k, v in after.items())


def test_one_encoder_pass_per_canvas_and_every_voxel_in_its_place(
    tiny: SAMModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that calls bright pixels foreground must give the volume back, thresholded."""
    model, passes = canvas.for_canvases(tiny, 1, seed=1), []

    def bright(_: SAMModel, canvases: torch.Tensor) -> torch.Tensor:
        passes.append(tuple(canvases.shape))
        return torch.stack([torch.zeros_like(canvases), 100 * (canvases - 0.5)], 1)

    monkeypatch.setattr(canvas, "forward", bright)
    image = np.random.default_rng(0).random((20, 16, 30)).astype(np.float32)
    found = canvas.predict(model, image, settings)
    assert passes == [(1, 64, 64)] * 3  # twelve tiles each
    assert found.shape == (2, 20, 16, 30)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
    np.testing.assert_array_equal(found[1] > 0.5, image > 0.5)


def test_slices_larger_than_the_input_get_a_larger_canvas(tiny: SAMModel, settings: Settings) -> None:
    model = canvas.for_canvases(tiny, 1, seed=1)
    assert canvas.canvas_size(model, (100, 30, 4), settings) == 100
    assert canvas.predict(model, np.zeros((100, 30, 4), np.float32), settings).shape == (2, 100, 30, 4)
    with pytest.raises(BadSettingsError, match="sam_canvas to 100"):
        canvas.predict(model, np.zeros((100, 30, 4), np.float32), settings.model_copy(update={"sam_canvas": 80}))


def test_it_learns_a_ball_without_prompts(small: Prepared, tiny_file: Path, tmp_path: Path, settings: Settings) -> None:
    chosen = {"labels": "ball", "nested": "", "sam_train": "lora", "sam_iterations": 60, "sam_learning_rate": 3e-3}
    settings = Settings(**settings.model_dump() | chosen)
    out = tmp_path / "canvas.safetensors"
    result = canvas.train([small], settings, out, init=tiny_file)
    assert result["loss"] < 0.7 * result["first_loss"]
    model = canvas.load(out, settings)
    found = canvas.predict(model, small.image, settings)
    truth = np.asarray(small.label) > 0
    assert 2 * ((found[1] > 0.5) & truth).sum() / ((found[1] > 0.5).sum() + truth.sum()) > 0.7
    metadata = read_metadata(out)
    assert (metadata["labels"], metadata["trained"], metadata["architecture"]["canvas"]) == (["ball"], "lora", True)
    with pytest.raises(BadWeightsError, match="takes no prompts"):
        load(out, settings)


@pytest.mark.parametrize("before", ["heart", "a,b,c", "tumour,liver"])
def test_a_sam_for_other_labels_gets_new_tokens(
    before: str,
    small: Prepared,
    tiny_file: Path,
    tmp_path: Path,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = Settings(**settings.model_dump() | {"labels": before, "nested": "", "sam_iterations": 0})
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    canvas.train([small], other, first, init=tiny_file)
    with caplog.at_level("WARNING"):
        canvas.train([small], settings.model_copy(update={"sam_iterations": 2}), second, init=first)
    assert "first.safetensors segments other labels" in caplog.text
    model = canvas.load(second, settings)
    assert (model.architecture.masks, model.metadata["labels"]) == (2, ["liver", "tumour"])


def test_pixels_between_the_slices_teach_nothing(
    small: Prepared, tiny: SAMModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    loss = canvas.segmentation_loss

    def watch(logits: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append((truth, weight))
        return loss(logits, truth, weight)

    monkeypatch.setattr(canvas, "segmentation_loss", watch)
    tuner = canvas._Tuner(canvas.for_canvases(tiny, 2, seed=1), [small], settings)
    tuner.step(0)
    assert len(seen) == canvas.BATCH
    for truth, weight in seen:
        assert weight.sum() == small.image.size
        assert not truth[weight == 0].any()
        assert truth.max() == 1


def test_as_many_neighbouring_slices_as_a_canvas_holds(
    ball_case: Callable[..., Prepared], tiny: SAMModel, settings: Settings
) -> None:
    case = ball_case(shape=(40, 32, 9))
    image = np.broadcast_to(np.arange(9) / 10, (40, 32, 9)).astype(np.float32)
    label = np.zeros((40, 32, 9), np.uint8)
    label[5:9, 5:9, 4] = 1
    tuner = canvas._Tuner(canvas.for_canvases(tiny, 2, seed=1), [replace(case, image=image, label=label)], settings)
    layout = Layout.of((40, 32, 9), 64)
    assert layout.rows * layout.columns == 2
    holding = 0
    for seed in range(30):
        _, target = tuner._canvas(tuner.cases[0], np.random.default_rng(seed))
        assert ((target != 255).sum(), target.shape) == (2 * 40 * 32, (64, 64))
        holding += int((target == 1).sum() == 16)
    assert 15 < holding < 30


def test_what_it_refuses(small: Prepared, tiny_file: Path, tmp_path: Path, settings: Settings) -> None:
    out = tmp_path / "canvas.safetensors"
    with pytest.raises(NotEnoughCasesError, match=r"liver or tumour.*Draw a label"):
        canvas.train([replace(small, label=np.zeros_like(small.label))], settings, out, init=tiny_file)
    with pytest.raises(BadWeightsError, match="expected a SAM for canvases"):
        canvas.load(tiny_file, settings)
    canvas.train([small], settings.model_copy(update={"sam_iterations": 0}), out, init=tiny_file)
    with pytest.raises(BadWeightsError, match=r"segments 2 labels \(liver, tumour\), settings name 1 \(heart\)"):
        canvas.load(out, settings.model_copy(update={"labels": ("heart",)}))
