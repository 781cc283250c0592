from __future__ import annotations

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aslseg.prompts.frame import SlicePrompt
from aslseg.prompts.from_client import parse
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling.architecture import build
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.redraw import redraw
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.sam.predictor.zoom import Crop, crop_for, full_crop, merge_crops
from aslseg.settings import Settings
from seeing_sam import TINY, Sees

SHAPE = (128, 128)  # a token of the tiny SAM is 16 of these pixels
NO_POINTS = np.zeros((0, 2)), np.zeros(0)


@pytest.fixture(scope="module")
def model() -> SAMModel:
    return SAMModel(build(TINY), TINY)


@pytest.fixture
def zooming() -> Settings:
    return Settings(sam_zoom=3, sam_iterations=2, sam_batch=2, device="cpu")


def boxed(x0: float, y0: float, x1: float, y1: float) -> SlicePrompt:
    return SlicePrompt((x0, y0, x1, y1), *NO_POINTS)


@pytest.mark.parametrize(("edge", "zoom"), [(60, 1), (48, 1), (40, 2), (24, 2), (20, 4), (2, 4)])
def test_an_object_is_enlarged_until_it_is_three_tokens_long(model: SAMModel, edge: int, zoom: int) -> None:
    crop = crop_for(boxed(30, 30, 30 + edge, 35), SHAPE, model, 3)
    assert crop.shape == (128 // zoom, 128 // zoom)
    assert (crop == full_crop(SHAPE)) == (zoom == 1)


def test_nothing_is_enlarged_without_a_size_or_with_the_setting_at_0(model: SAMModel) -> None:
    lone = SlicePrompt(None, np.array([[20.0, 20.0]]), np.array([1]))
    assert crop_for(lone, SHAPE, model, 3) == full_crop(SHAPE)
    assert crop_for(replace(lone, mask=np.zeros(SHAPE, np.float32)), SHAPE, model, 3) == full_crop(SHAPE)
    assert crop_for(boxed(30, 30, 34, 34), SHAPE, model, 0) == full_crop(SHAPE)


def test_a_far_click_inside_the_object_makes_it_large_and_one_outside_does_not(model: SAMModel) -> None:
    mask = np.zeros(SHAPE, np.float32)
    mask[20:26, 20:30] = 0.9
    points, far = np.array([[22.0, 22.0], [100.0, 90.0]]), np.array([1, 1])
    assert crop_for(SlicePrompt(None, points, far, mask), SHAPE, model, 3) == full_crop(SHAPE)
    tight = crop_for(SlicePrompt(None, points, np.array([1, 0]), mask), SHAPE, model, 3)
    assert tight.shape == (32, 32)
    local = tight.to_crop(SlicePrompt(None, points, np.array([1, 0]), mask))
    assert local.point_labels.tolist() == [1]
    assert np.array_equal(local.points, [[22 - tight.columns[0], 22 - tight.rows[0]]])


@hypothesis.settings(deadline=None)
@given(
    st.tuples(st.integers(20, 200), st.integers(20, 200)),
    st.tuples(st.floats(0, 0.95), st.floats(0, 0.95), st.floats(0.01, 0.5), st.floats(0.01, 0.5)),
)
def test_a_tile_holds_its_object_whatever_the_slice(
    model: SAMModel, shape: tuple[int, int], at: tuple[float, float, float, float]
) -> None:
    x0, y0 = int(at[0] * shape[1]), int(at[1] * shape[0])
    x1, y1 = min(x0 + 1 + int(at[2] * shape[1]), shape[1]), min(y0 + 1 + int(at[3] * shape[0]), shape[0])
    crop = crop_for(boxed(x0, y0, x1, y1), shape, model, 3)
    assert 0 <= crop.rows[0] <= y0
    assert y1 <= crop.rows[1] <= shape[0]
    assert 0 <= crop.columns[0] <= x0
    assert x1 <= crop.columns[1] <= shape[1]
    prompt = crop.to_crop(boxed(x0, y0, x1, y1))
    mask = np.zeros(shape, np.float32)
    mask[y0:y1, x0:x1] = 1
    assert prompt.box is not None
    a, b, c, d = (int(v) for v in prompt.box)
    assert mask[crop.index][b:d, a:c].sum() == mask.sum()


def test_objects_that_differ_a_little_share_a_tile(model: SAMModel) -> None:
    tiles = {crop_for(boxed(40 + n, 41, 56 + n, 57), SHAPE, model, 3) for n in range(-2, 3)}
    assert len(tiles) == 1


def scan(*corners: tuple[int, int], edge: int = 8) -> np.ndarray:
    """Bright squares on every slice of (128, 128, 3)."""
    image = np.full((*SHAPE, 3), 0.1, np.float32)
    for i, j in corners:
        image[i : i + edge, j : j + edge] = 0.9
    return image


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("corner", [(0, 0), (60, 20), (101, 119), (33, 64)])
def test_a_small_object_in_a_box_is_drawn_where_it_is_and_sharper(
    model: SAMModel, zooming: Settings, corner: tuple[int, int]
) -> None:
    image = scan(corner, edge=9)
    (i, j), found = corner, {}
    told = {"roi": [i - 1, i + 9, j - 1, j + 9, 1, 1], "foreground": [[i + 4, j + 4, 1]]}
    for zoom in (0.0, 3.0):
        clicks = ClickSession(SlicePredictor(Sees(model), image, zooming.model_copy(update={"sam_zoom": zoom})))
        drawn = clicks.on_slice(parse(told, image.shape))
        assert drawn is not None
        found[zoom] = dice(drawn[1], image[..., 1] > 0.5)
    assert found[3.0] > 0.9
    assert found[3.0] >= found[0.0]


def test_a_lone_click_on_something_small_is_looked_at_again_from_near(model: SAMModel, zooming: Settings) -> None:
    image, sees = scan((60, 20)), Sees(model)
    clicks = ClickSession(SlicePredictor(sees, image, zooming))
    drawn = clicks.on_slice(parse({"foreground": [[64, 24, 1]]}, image.shape))
    assert drawn is not None
    assert sees.encoded == 2
    (_, _, first), (_, _, second), (points, _, third) = sees.asked
    assert first is None
    assert second is not None
    assert third is not None
    tile = crop_for(boxed(20, 60, 28, 68), SHAPE, model, 3)
    assert np.allclose(points[0], [[[(24 - tile.columns[0]) * 2, (64 - tile.rows[0]) * 2]]])
    assert dice(drawn[1], image[..., 1] > 0.5) > 0.9


def test_a_lone_click_on_something_large_is_answered_once(model: SAMModel, zooming: Settings) -> None:
    image, sees = scan((20, 20), edge=80), Sees(model)
    clicks = ClickSession(SlicePredictor(sees, image, zooming))
    clicks.on_slice(parse({"foreground": [[64, 50, 1]]}, image.shape))
    assert len(sees.asked) == sees.encoded == 1


def test_a_small_object_is_followed_through_the_slices(model: SAMModel, zooming: Settings) -> None:
    image = scan((60, 20))
    clicks = ClickSession(SlicePredictor(Sees(model), image, zooming))
    mask = clicks.answer(parse({"foreground": [[64, 24, 1]]}, image.shape))
    assert dice(mask > 0, image > 0.5) > 0.95


def test_answers_count_by_the_fourth_power_of_the_predicted_iou() -> None:
    all_of_it, tile = full_crop((4, 4)), Crop((0, 2), (0, 2))
    far, near = np.full((4, 4), 0.2, np.float32), np.full((2, 2), 0.8, np.float32)
    probability, belief = merge_crops([(all_of_it, far, 0.5), (tile, near, 1.0)], (4, 4))
    assert np.allclose(probability[:2, :2], (0.2 / 16 + 0.8) / (1 / 16 + 1))
    assert np.allclose(probability[2:], 0.2)
    assert belief == pytest.approx((0.5 / 16 + 1) / (1 / 16 + 1))
    assert np.array_equal(merge_crops([(all_of_it, far, -0.1)], (4, 4))[0], far)
    assert merge_crops([(tile, near, 0.7)], (4, 4))[0].sum() == np.float32(3.2)


def test_part_of_a_view_is_found_again_on_the_slice() -> None:
    slice_ = np.arange(80).reshape(8, 10)
    crop = Crop((2, 7), (3, 9))
    near = crop.intersect(slice(0, 5), slice(4, 20))
    assert near == Crop((2, 5), (4, 9))
    assert np.array_equal(slice_[crop.index][near.index_in(crop)], slice_[near.index])


def test_redrawing_looks_twice_at_small_components(model: SAMModel, zooming: Settings) -> None:
    image = scan((100, 100), (4, 104))
    image[20:80, 10:90] = 0.9
    sees = Sees(model)
    out = redraw(sees, image, (image > 0.5)[None].astype(np.float32), zooming)
    assert sees.encoded == 9  # on each slice all of it and two tiles
    assert dice(out[0] >= 0.5, image > 0.5) > 0.95
