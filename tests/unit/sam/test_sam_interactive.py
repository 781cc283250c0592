from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from aslseg.prompts.from_client import ClientPrompt, parse
from aslseg.sam.build import SAMModel
from aslseg.sam.embeddings import EmbeddingCache, content_hash
from aslseg.sam.interactive import Clicks, _journeys
from aslseg.settings import Settings
from aslseg.types import Prepared


class Sees(SAMModel):
    """Stands for a perfect SAM: answers with what is bright on the slice, where the prompt is; counts its work."""

    def __init__(self, base: SAMModel) -> None:
        super().__init__(base.sam, base.architecture)
        self.bf16, self.encoded, self.asked = False, 0, []

    def encode(self, slices: Tensor) -> Tensor:
        self.encoded += len(slices)
        low = self.to_low_res(slices)
        # the embedding itself carries the picture: (B, 16, grid, grid) holds every low-res pixel
        return torch.pixel_unshuffle(low[:, None], 4)

    def decode(self, embeddings: Tensor, points=None, boxes=None, masks=None, multimask=False):
        self.asked.append((points, boxes, masks))
        low = torch.pixel_shuffle(embeddings, 4)
        believed = 0.9 if (low > 0.5).any() else 0.1
        logits = (low - 0.5) * 60
        return logits, torch.full((len(logits), 1), believed)


@pytest.fixture
def scene(ball_case: Callable[..., Prepared], tiny: SAMModel, settings: Settings) -> tuple[Clicks, Sees, np.ndarray]:
    case = ball_case(shape=(40, 32, 9), tumour=False)
    model = Sees(tiny)
    return Clicks(model, case.image, settings, cache=EmbeddingCache()), model, np.asarray(case.label)


def clicks(foreground: list[list[int]], background: list[list[int]] | None = None, **more: object) -> ClientPrompt:
    return parse({"foreground": foreground, "background": background or [], **more}, (40, 32, 9))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_one_click_grows_to_the_whole_object(scene: tuple[Clicks, Sees, np.ndarray]) -> None:
    state, model, truth = scene
    mask = state.answer(clicks([[16, 14, 4]]))
    assert mask.dtype == np.uint8
    assert mask.shape == (40, 32, 9)
    assert dice(mask > 0, truth > 0) > 0.9
    assert not mask[..., [0, 8]].any()
    assert model.encoded <= 9


def test_the_second_click_encodes_nothing(scene: tuple[Clicks, Sees, np.ndarray]) -> None:
    state, model, _ = scene
    state.answer(clicks([[16, 14, 4]]))
    before = model.encoded
    state.answer(clicks([[16, 14, 4], [18, 16, 4], [16, 14, 3]], [[2, 2, 4]]))
    assert model.encoded == before


def test_the_first_click_alone_then_all_with_the_answer_as_mask(
    scene: tuple[Clicks, Sees, np.ndarray],
) -> None:
    state, model, _ = scene
    state.answer(clicks([[16, 14, 4]], [[2, 5, 4]]))
    (first, labels), _, no_mask = model.asked[0]
    x, y = 51 / 32, 64 / 40  # the slice fills 64 x 51 of the frame
    assert np.allclose(first, [[[14 * x, 16 * y]]])
    assert labels.tolist() == [[1]]
    assert no_mask is None
    (both, labels), _, mask = model.asked[1]
    assert np.allclose(both, [[[14 * x, 16 * y], [5 * x, 2 * y]]])
    assert labels.tolist() == [[1, 0]]
    assert mask is not None


def test_a_neighbour_is_asked_with_box_point_and_mask_and_its_own_negative_clicks(
    scene: tuple[Clicks, Sees, np.ndarray],
) -> None:
    state, model, _ = scene
    state.answer(clicks([[16, 14, 4]], [[2, 5, 5]]))
    (_, labels), boxes, masks = model.asked[1]  # slice 5 comes first
    assert labels.tolist() == [[1, 0]]
    assert boxes is not None
    assert masks is not None


def test_a_box_alone_starts_in_its_middle_and_bounds_the_object(
    scene: tuple[Clicks, Sees, np.ndarray],
) -> None:
    state, _, truth = scene
    mask = state.answer(parse({"roi": [28, 4, 26, 2, 5, 3]}, (40, 32, 9)))
    assert mask[..., 3:6].any((0, 1)).all()
    assert not mask[..., :3].any()
    assert not mask[..., 6:].any()
    assert dice(mask[..., 4] > 0, truth[..., 4] > 0) > 0.85
    small = state.answer(parse({"roi": [12, 20, 10, 18, 4, 4]}, (40, 32, 9)))
    assert small.any((0, 1)).sum() == 1


def test_background_clicks_alone_give_nothing(scene: tuple[Clicks, Sees, np.ndarray]) -> None:
    state, model, _ = scene
    assert not state.answer(clicks([], [[16, 14, 4]])).any()
    assert not state.answer(clicks([])).any()
    assert model.encoded == 0


def test_answers_depend_on_the_clicks_alone(scene: tuple[Clicks, Sees, np.ndarray]) -> None:
    state, _, _ = scene
    first = state.answer(clicks([[16, 14, 4]]))
    state.answer(clicks([[30, 28, 2]]))
    assert np.array_equal(state.answer(clicks([[16, 14, 4]])), first)


def test_growing_stops_where_sam_no_longer_believes(scene: tuple[Clicks, Sees, np.ndarray]) -> None:
    state, _, _ = scene
    image = state.image.copy()
    image[..., 6:] = 0  # the object is cut off
    cut = Clicks(state.model, image, state.settings, cache=EmbeddingCache())
    mask = cut.answer(clicks([[16, 14, 4]]))
    assert mask[..., 5].any()
    assert not mask[..., 6:].any()


def test_growing_stops_where_the_area_jumps(scene: tuple[Clicks, Sees, np.ndarray]) -> None:
    state, _, _ = scene
    image = state.image.copy()
    image[..., 5:] = 1  # everything is bright there
    mask = Clicks(state.model, image, state.settings, cache=EmbeddingCache()).answer(clicks([[16, 14, 4]]))
    assert mask[..., 4].any()
    assert not mask[..., 5:].any()


def test_an_automatic_mask_is_the_prompt_on_clicked_slices(scene: tuple[Clicks, Sees, np.ndarray]) -> None:
    state, model, truth = scene
    with_mask = Clicks(model, state.image, state.settings, truth.astype(np.float32), cache=EmbeddingCache())
    model.asked.clear()
    with_mask.answer(clicks([[16, 14, 4]]))
    assert model.asked[0][2] is not None


def test_neighbours_meet_half_way() -> None:
    assert list(_journeys([2, 7], (0, 9))) == [(2, 1, 4), (2, -1, 0), (7, 1, 9), (7, -1, 5)]
    assert list(_journeys([3, 4], (0, 9))) == [(3, 1, 3), (3, -1, 0), (4, 1, 9), (4, -1, 4)]
    assert list(_journeys([], (0, 9))) == []


def test_a_volume_of_one_slice(tiny: SAMModel, settings: Settings) -> None:
    image = np.zeros((20, 20, 1), np.float32)
    image[5:15, 5:15] = 1
    state = Clicks(Sees(tiny), image, settings, cache=EmbeddingCache())
    assert state.answer(parse({"foreground": [[10, 10, 0]]}, image.shape)).sum() > 80


def test_another_volume_or_model_is_another_entry(tiny: SAMModel, tiny_file: object, settings: Settings) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 16, 16, 1)).astype(np.float32)
    assert content_hash(a) != content_hash(b)
    assert content_hash(a) == content_hash(a.copy())
    cache, model = EmbeddingCache(), Sees(tiny)
    for image in (a, b, a):
        cache.get(model, image, [0], (content_hash(image), model.fingerprint))
    assert model.encoded == 2


def test_cache_forgets_the_least_recently_used(tiny: SAMModel) -> None:
    model = Sees(tiny)
    image = np.random.default_rng(0).random((16, 16, 4)).astype(np.float32)
    one = model.encode(torch.rand(1, 16, 16)).to(torch.float16).nbytes
    cache = EmbeddingCache(limit=2 * one)
    model.encoded = 0
    for k in (0, 1, 0, 2):
        cache.get(model, image, [k], "x")
    assert (cache.has("x", 0), cache.has("x", 1), cache.has("x", 2)) == (True, False, True)
    assert cache.bytes == 2 * one
    assert model.encoded == 3


def test_cached_embeddings_are_those_of_the_slices(tiny: SAMModel) -> None:
    image = np.random.default_rng(0).random((24, 16, 5)).astype(np.float32)
    cache = EmbeddingCache()
    with torch.inference_mode():
        cache.get(tiny, image, [3], "x")
        got = cache.get(tiny, image, [4, 3, 4], "x")
        expected = tiny.encode(np.ascontiguousarray(image[..., [4, 3, 4]].transpose(2, 0, 1)))
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)


def test_cache_is_safe_between_threads(tiny: SAMModel) -> None:
    image = np.random.default_rng(0).random((16, 16, 6)).astype(np.float32)
    cache = EmbeddingCache()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: cache.get(tiny, image, [n % 6], "x"), range(48)))
    assert cache.bytes == 6 * answers[0].nbytes // 2
    for n, answer in enumerate(answers):
        assert torch.equal(answer, answers[n % 6])
