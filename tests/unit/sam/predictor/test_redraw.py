from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from aslseg.cases.prepared_case import Prepared
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.redraw import redraw
from aslseg.sam.predictor.slice_predictor import LEAK_MARGIN
from aslseg.settings import Settings


@pytest.fixture
def regions(ball_case: Callable[..., Prepared], settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    case = ball_case()
    return case.image, settings.label_set.regions(case.label).astype(np.float32) * 0.9


class Recorder(SAMModel):
    """Counts encoder passes and answers every prompt with a constant."""

    def __init__(self, base: SAMModel, logit: float = 5.0) -> None:
        super().__init__(base.sam, base.architecture)
        self.bf16, self.logit, self.encoded, self.asked = False, logit, 0, []

    def encode(self, slices: Tensor) -> Tensor:
        self.encoded += len(slices)
        return super().encode(slices)

    def decode(self, embeddings: Tensor, points=None, boxes=None, masks=None, multimask=False):
        self.asked.append((points, boxes, masks, multimask))
        low, iou = super().decode(embeddings, points, boxes, masks, multimask)
        return torch.full_like(low, self.logit), iou


def test_shape_range_and_determinism(
    tiny: SAMModel, regions: tuple[np.ndarray, np.ndarray], settings: Settings
) -> None:
    image, ssl = regions
    a, b = redraw(tiny, image, ssl, settings), redraw(tiny, image, ssl, settings)
    assert a.shape == ssl.shape
    assert a.dtype == np.float32
    assert a.min() >= 0
    assert a.max() <= 1
    assert np.array_equal(a, b)


def test_only_slices_with_a_region_are_encoded_once(
    tiny: SAMModel, regions: tuple[np.ndarray, np.ndarray], settings: Settings
) -> None:
    image, ssl = regions
    ssl = ssl.copy()
    ssl[..., :2] = 0
    model = Recorder(tiny)
    out = redraw(model, image, ssl, settings)
    assert model.encoded == (ssl >= 0.5).any((0, 1, 2)).sum()
    assert not out[..., :2].any()


def test_no_prompt_no_prediction(tiny: SAMModel, regions: tuple[np.ndarray, np.ndarray], settings: Settings) -> None:
    image, ssl = regions
    model = Recorder(tiny)
    assert not redraw(model, image, np.zeros_like(ssl), settings).any()
    assert model.encoded == 0
    ssl = np.zeros_like(ssl)
    ssl[0, 3, 3, 2] = 0.9  # a speck: too small to prompt with
    assert not redraw(model, image, ssl, settings.model_copy(update={"min_component": 50})).any()


def test_nothing_leaks_far_from_the_box(tiny: SAMModel, settings: Settings) -> None:
    """Even a SAM that says yes everywhere is kept to the box and ten pixels of its input."""
    image = np.zeros((64, 48, 1), np.float32)
    ssl = np.zeros((1, 64, 48, 1), np.float32)
    ssl[0, 20:30, 8:14, 0] = 1
    out = redraw(Recorder(tiny), image, ssl, settings)[0, ..., 0]
    reach = int(settings.box_margin) + LEAK_MARGIN
    expected = np.zeros((64, 48), bool)
    expected[20 - reach : 30 + reach, max(0, 8 - reach) : 14 + reach] = True
    assert np.array_equal(out > 0.5, expected)


def test_components_and_regions_are_independent(
    tiny: SAMModel, regions: tuple[np.ndarray, np.ndarray], settings: Settings
) -> None:
    image, ssl = regions
    both = redraw(tiny, image, ssl, settings)
    liver = redraw(tiny, image, np.stack([ssl[0], np.zeros_like(ssl[0])]), settings)
    np.testing.assert_allclose(both[0], liver[0], atol=1e-5)
    assert not liver[1].any()


@pytest.mark.parametrize("use", ["box", "point", "mask", "box+mask", "box+point+mask"])
def test_only_the_chosen_parts_reach_sam(
    use: str, tiny: SAMModel, regions: tuple[np.ndarray, np.ndarray], settings: Settings
) -> None:
    image, ssl = regions
    model = Recorder(tiny)
    redraw(model, image, ssl, settings.model_copy(update={"sam_prompts": tuple(use.split("+"))}))
    for points, boxes, masks, multimask in model.asked:
        assert (points is not None) == ("point" in use)
        assert (boxes is not None) == ("box" in use)
        assert (masks is not None) == ("mask" in use)
        assert multimask == (use == "point")


def test_batches_do_not_change_the_answer(
    tiny: SAMModel, regions: tuple[np.ndarray, np.ndarray], settings: Settings
) -> None:
    image, ssl = regions
    one = redraw(tiny, image, ssl, settings.model_copy(update={"sam_batch": 1}))
    all_ = redraw(tiny, image, ssl, settings.model_copy(update={"sam_batch": 16}))
    np.testing.assert_allclose(one, all_, atol=1e-4)


def test_shapes_must_agree(tiny: SAMModel, settings: Settings) -> None:
    with pytest.raises(ValueError, match="expected regions of shape"):
        redraw(tiny, np.zeros((8, 8, 2), np.float32), np.zeros((1, 8, 8, 3), np.float32), settings)


def test_nested_labels_are_shown_relative_to_the_predicted_parent_if_sam_has_learned_that(
    tiny: SAMModel, regions: tuple[np.ndarray, np.ndarray], settings: Settings
) -> None:
    image, ssl = regions
    dark, bright = 0.5 * image, 0.5 * image + np.float32(0.3)
    plain = [redraw(tiny, shown, ssl, settings) for shown in (dark, bright)]
    tiny.metadata["relative"] = settings.nested_range
    seen = [redraw(tiny, shown, ssl, settings) for shown in (dark, bright)]
    # the parent as before, the tumour in another way
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(plain, seen, strict=True))
    assert all(not np.array_equal(a[1], b[1]) for a, b in zip(plain, seen, strict=True))
    assert not np.allclose(plain[0][1], plain[1][1], atol=1e-3)
    np.testing.assert_allclose(seen[0][1], seen[1][1], atol=1e-3)
    alone = np.stack([np.zeros_like(ssl[0]), ssl[1]])
    found = redraw(tiny, dark, alone, settings)
    del tiny.metadata["relative"]
    assert np.array_equal(found, redraw(tiny, dark, alone, settings))


def test_each_lesion_of_a_slice_has_a_prompt_of_its_own(tiny: SAMModel, settings: Settings) -> None:
    image = np.full((64, 64, 1), 0.5, np.float32)
    ssl = np.zeros((2, 64, 64, 1), np.float32)
    ssl[0, 4:60, 4:60] = 0.9
    for start in (10, 40):
        ssl[1, start : start + 12, start : start + 12] = 0.9
    model = Recorder(tiny)
    tiny.metadata["relative"] = settings.nested_range
    model.metadata["relative"] = settings.nested_range
    redraw(model, image, ssl, settings.model_copy(update={"sam_zoom": 0}))
    assert sum(len(boxes) for _, boxes, _, _ in model.asked) == 3
