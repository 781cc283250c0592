from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from aslseg.prompts.frame import SlicePrompt
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embeddings import EmbeddingCache
from aslseg.sam.predictor.slice_predictor import SlicePredictor, predict_masks
from aslseg.sam.predictor.slices import SliceSource
from aslseg.settings import Settings
from seeing_sam import Sees

ALL = ("box", "point", "mask")
NO_POINTS, POINT = (np.zeros((0, 2)), np.zeros(0, int)), (np.array([[20.0, 20.0]]), np.array([1]))
BOX, MASK = (8.0, 16.0, 40.0, 48.0), np.full((64, 64), 0.3, np.float32)


@pytest.fixture
def volume() -> np.ndarray:
    """A bright square on each of four different slices of 40 x 32 pixels."""
    volume = np.full((40, 32, 4), 0.1, np.float32)
    volume[10:25, 8:22] = 0.9
    volume[0, 0] = [0.0, 0.1, 0.2, 0.3]
    return volume


def boxed(*corners: float) -> SlicePrompt:
    return SlicePrompt((*corners,), *NO_POINTS)


def test_a_slice_is_encoded_once_however_often_it_is_asked_about(
    tiny: SAMModel, settings: Settings, volume: np.ndarray
) -> None:
    predictor = SlicePredictor(Sees(tiny), volume, settings)
    assert (predictor.shape, predictor.depth, predictor.scale) == ((40, 32), 4, 51 / 32)
    prompts = [boxed(8, 10, 22, 25), boxed(6, 8, 24, 27)]
    assert not predictor.is_embedded(2)
    answers = predictor.predict(2, prompts)
    assert len(answers) == 2
    for probability, iou in answers:
        assert (probability.shape, probability.dtype) == ((40, 32), np.float32)
        assert ((probability >= 0.5) == (volume[..., 2] > 0.5)).mean() > 0.97
        assert iou == pytest.approx(0.9)
    again = predictor.predict(2, prompts[:1])
    assert np.array_equal(again[0][0], answers[0][0])
    assert predictor.model.encoded == 1
    assert predictor.is_embedded(2)
    assert not predictor.is_embedded(1)
    assert predictor.predict(1, []) == []


def test_predictors_share_embeddings_through_their_cache(
    tiny: SAMModel, settings: Settings, volume: np.ndarray
) -> None:
    model, cache = Sees(tiny), EmbeddingCache()
    SlicePredictor(model, volume, settings, cache).embed([0, 1])
    window = SliceSource(volume * 400 - 160, (-160.0, 240.0))
    assert SlicePredictor(model, window, settings, cache).predict(1, [boxed(8, 10, 22, 25)])
    assert model.encoded == 2
    assert not SlicePredictor(model, volume, settings).is_embedded(0), "without a cache it has its own"


def test_a_small_object_is_asked_about_on_the_slice_and_on_a_crop(tiny: SAMModel, volume: np.ndarray) -> None:
    predictor = SlicePredictor(Sees(tiny), volume, Settings(sam_zoom=5, device="cpu"))
    [(probability, _)] = predictor.predict(0, [boxed(12, 14, 15, 17)])
    assert predictor.model.encoded == 2
    assert probability.shape == (40, 32)
    assert len(predictor.crops([boxed(12, 14, 15, 17), boxed(0, 0, 32, 40)])) == 2


def test_slices_ahead_are_encoded_in_a_batch_only_where_that_is_quicker(
    tiny: SAMModel, settings: Settings, volume: np.ndarray
) -> None:
    predictor = SlicePredictor(Sees(tiny), volume, settings.model_copy(update={"sam_batch": 3}))
    predictor.embed_ahead(0, 1, 3)
    assert predictor.model.encoded == 0, "a CPU gains nothing"
    embedded: list[list[int]] = []
    predictor.embed = embedded.append
    predictor.model.device = torch.device("meta")  # stands for a GPU
    predictor.embed_ahead(0, 1, 3)
    predictor.embed_ahead(1, -1, 0)
    assert embedded == [[0, 1, 2], [1, 0]]


def test_timings_are_moving_averages_of_what_took_time(tiny: SAMModel, settings: Settings, volume: np.ndarray) -> None:
    predictor = SlicePredictor(Sees(tiny), volume, settings)
    for seconds in (0.4, 0.2, 0.001):
        predictor.record("encode", seconds)
    predictor.record("step", 0.1)
    assert predictor.timings == {"encode": pytest.approx(0.3), "step": 0.1}
    assert predictor.expected_seconds(1) == pytest.approx(0.4)
    predictor.embed([1])
    assert predictor.expected_seconds(1) == pytest.approx(0.1)


def test_probabilities_far_from_a_box_are_dropped(tiny: SAMModel, settings: Settings, volume: np.ndarray) -> None:
    predictor = SlicePredictor(Sees(tiny), volume, settings)
    ones = np.ones((40, 32), np.float32)
    inside = predictor.keep_in_box(ones, (10, 12, 20, 22), margin=0)
    assert inside.sum() == inside[12:22, 10:20].sum() == 100
    assert predictor.keep_in_box(ones, None).all()
    wide = predictor.keep_in_box(ones, (10, 12, 20, 22))
    assert np.flatnonzero(wide.any(1))[[0, -1]].tolist() == [5, 28], "ten pixels of the input are 6.3 of the slice"


class Recorder(SAMModel):
    """Answers every prompt with a constant and records the questions."""

    def __init__(self, base: SAMModel) -> None:
        super().__init__(base.sam, base.architecture)
        self.bf16, self.asked = False, []

    def decode(self, embeddings: Tensor, points=None, boxes=None, masks=None, multimask=False):
        self.asked.append((points, boxes, masks, multimask))
        low, iou = super().decode(embeddings, points, boxes, masks, multimask)
        return torch.full_like(low, 5.0), iou


@pytest.mark.parametrize("box_mask", [True, False])
def test_a_box_without_a_mask_has_its_ellipse_for_a_sam_that_knows_it(tiny: SAMModel, box_mask: bool) -> None:
    model = Recorder(tiny)
    model.architecture = tiny.architecture.with_conventions(box_mask=box_mask)
    embedding = tiny.encode(np.zeros((1, 64, 64), np.float32))
    for prompt in (SlicePrompt(BOX, *NO_POINTS), SlicePrompt(BOX, *POINT), SlicePrompt(BOX, *NO_POINTS, MASK)):
        predict_masks(model, embedding, [prompt], (64, 64), ALL)
    predict_masks(model, embedding, [SlicePrompt(None, *POINT)], (64, 64), ALL)
    alone, clicked, masked, point_alone = (masks for _, _, masks, _ in model.asked)
    assert point_alone is None
    assert torch.equal(masked, model.mask_prompt(torch.full((1, 32, 32), 0.3)))
    if not box_mask:
        assert alone is clicked is None
        return
    assert torch.equal(alone, clicked)
    rows, columns = torch.where(alone[0, 0] > 0)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 23, 4, 19)
    predict_masks(model, embedding, [SlicePrompt(BOX, *NO_POINTS)], (64, 64), ALL, ellipse=False)
    assert model.asked[-1][2] is None


@pytest.mark.parametrize(("kind", "lone_click", "others"), [("ambiguous", 3, 1), ("always", 3, 3), ("never", 1, 1)])
def test_as_many_masks_are_asked_for_as_the_kind_was_trained_with(
    tiny: SAMModel, kind: str, lone_click: int, others: int
) -> None:
    offered: list[int] = []

    class Best(SAMModel):
        def decode(self, embeddings: Tensor, points=None, boxes=None, masks=None, multimask=False):
            low, _ = super().decode(embeddings, points, boxes, masks, multimask)
            offered.append(low.shape[1])
            score = torch.arange(1.0, 1 + low.shape[1]).expand(len(low), -1)
            return torch.zeros_like(low) + score[..., None, None], score  # the last mask has the highest score

    model = Best(tiny.sam, tiny.architecture.with_conventions(multimask=kind))
    embedding = tiny.encode(np.zeros((1, 64, 64), np.float32))
    prompts = [
        (None, *POINT, None),
        (BOX, *NO_POINTS, None),
        (None, *POINT, MASK),
        (None, *NO_POINTS, MASK),
        (BOX, *POINT, None),
    ]
    for prompt, expected in zip(prompts, [lone_click] + 4 * [others], strict=True):
        logits, _, iou = predict_masks(model, embedding, [SlicePrompt(*prompt)], (64, 64), ALL)
        assert (offered[-1], iou.item(), logits.max().item()) == (expected, expected, expected)


def test_prompts_are_scaled_to_the_input_frame(tiny: SAMModel) -> None:
    """A slice of 32 x 16 fills 64 x 32: (x, y) doubles."""
    model = Recorder(tiny)
    prompt = SlicePrompt((2.0, 4.0, 10.0, 20.0), np.array([[3.0, 7.0]]), np.array([1]))
    more = SlicePrompt((0.0, 0.0, 8.0, 8.0), np.array([[1.0, 2.0], [5.0, 6.0]]), np.array([1, 0]))
    with torch.no_grad():
        embedding = model.encode(torch.rand(1, 32, 16))
        logits, low, iou = predict_masks(model, embedding, [prompt, more], (32, 16), ("box", "point"))
    (points, labels), boxes, masks, _ = model.asked[0]
    assert boxes.tolist() == [[4, 8, 20, 40], [0, 0, 16, 16]]
    assert points.tolist() == [[[6, 14], [0, 0]], [[2, 4], [10, 12]]]
    assert labels.tolist() == [[1, -1], [1, 0]]
    assert masks is None
    assert (logits.shape, low.shape, iou.shape) == ((2, 32, 16), (2, 32, 32), (2,))
