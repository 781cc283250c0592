"""A first click on an object that lies in another one, and the steps to a smaller or larger answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from aslseg.prompts.from_client import parse
from aslseg.resources import small_sam
from aslseg.sam.clicks.allowed_region import AllowedRegion
from aslseg.sam.clicks.automatic_mask import AutomaticMask
from aslseg.sam.clicks.first_click import (
    Candidate,
    border_clearness,
    choose,
    draw_first_click,
    gradient_ranks,
    nested_candidates,
    one_component,
)
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling.build import SAMModel, load
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.sam.predictor.zoom import full_crop
from aslseg.settings import Settings
from aslseg.volume.intensity import normalise
from aslseg.volume.phantom import make_phantom
from click_scenes import dice
from seeing_sam import Sees

SHAPE = (128, 128)
LESION, ORGAN = 9, 40  # radii in pixels
CENTRE = (60, 66)
POINT = np.array([66.0, 60.0])  # (x, y)


def disc(radius: float, centre: tuple[int, int] = CENTRE) -> np.ndarray:
    i, j = np.ogrid[: SHAPE[0], : SHAPE[1]]
    return (i - centre[0]) ** 2 + (j - centre[1]) ** 2 <= radius**2


@pytest.fixture
def image() -> np.ndarray:
    """A dark lesion in a bright organ on black ground: the organ has by far the clearer border."""
    return (0.05 + 0.6 * disc(ORGAN) - 0.1 * disc(LESION)).astype(np.float32)


class Offers(Sees):
    """Offers discs around the click, in millimetres the same on every crop, and believes in the largest."""

    def __init__(self, base: SAMModel, radii: tuple[float, ...]) -> None:
        super().__init__(base)
        self.radii, self.zooms = radii, []

    def encode(self, slices):
        self.zooms.append(SHAPE[0] / slices.shape[-1])
        found = super().encode(slices)
        return torch.cat([found[:, :1] * 0 + self.zooms[-1], found[:, 1:]], 1)

    def decode(self, embeddings, points=None, boxes=None, masks=None, multimask=False):
        self.asked.append((points, boxes, masks))
        zoom, edge = float(embeddings[0, 0, 0, 0]), 4 * self.architecture.grid
        x, y = points[0][0, 0] * edge / self.image_size
        rows, columns = torch.arange(edge)[:, None] + 0.5, torch.arange(edge)[None] + 0.5
        far = torch.hypot(rows - y, columns - x) * SHAPE[0] / edge / zoom
        radii = torch.tensor(self.radii)[:, None, None]
        return ((radii - far) * 3)[None], torch.linspace(0.5, 0.9, len(self.radii))[None]


@pytest.fixture
def offers(tiny: SAMModel, image: np.ndarray) -> SlicePredictor:
    return SlicePredictor(Offers(tiny, (4.0, LESION, ORGAN)), image[..., None], Settings(device="cpu"))


def area(probability: np.ndarray) -> int:
    return int((probability >= 0.5).sum())


def test_of_a_nested_object_the_mask_with_the_clearest_border_counts(offers: SlicePredictor) -> None:
    nested = draw_first_click(offers, 0, POINT, nested=True)
    assert dice(nested >= 0.5, disc(LESION)) > 0.9
    plain = draw_first_click(offers, 0, POINT, nested=False)
    assert dice(plain >= 0.5, disc(ORGAN)) > 0.9, "otherwise that of which SAM predicts the highest IoU"


@pytest.mark.parametrize(("size", "radius"), [("smaller", 4), ("smallest", 4), ("largest", ORGAN), (None, LESION)])
def test_size_steps_through_the_masks(offers: SlicePredictor, size: str | None, radius: float) -> None:
    found = draw_first_click(offers, 0, POINT, nested=True, size=size)  # type: ignore[arg-type]
    assert dice(found >= 0.5, disc(radius)) > 0.85


def test_a_larger_answer_is_larger_than_the_plain_one(offers: SlicePredictor) -> None:
    plain, larger = (draw_first_click(offers, 0, POINT, nested=True, size=s) for s in (None, "larger"))  # type: ignore[arg-type]
    assert area(larger) > area(plain)


def test_where_there_is_no_smaller_mask_the_answer_stays(offers: SlicePredictor) -> None:
    sizes = [draw_first_click(offers, 0, POINT, nested=False, size=s) for s in ("larger", "largest", None)]  # type: ignore[arg-type]
    assert len({area(s) for s in sizes}) == 1


def test_steps_go_to_the_next_mask_of_clearly_another_size() -> None:
    found = [Candidate(np.zeros((1, 1)), a, s) for a, s in ((100, 0.9), (110, 0.1), (50, 0.2), (20, 0.3), (300, 0.4))]
    assert [choose(found, s).area for s in (None, "smaller", "smallest", "larger", "largest")] == [
        100,
        50,
        20,
        300,
        300,
    ]  # type: ignore[arg-type]


def test_nothing_lies_outside_the_parent_and_a_finished_object(offers: SlicePredictor) -> None:
    parent = disc(30, (60, 70))[..., None].astype(np.float32)
    finished = np.zeros((*SHAPE, 1), bool)
    finished[:58] = True
    allowed = AllowedRegion(AutomaticMask(parent, (*SHAPE, 1)), finished)
    for size in (None, "largest"):
        found = draw_first_click(offers, 0, POINT, nested=True, size=size, allowed=allowed) >= 0.5  # type: ignore[arg-type]
        assert found.any()
        assert not (found & ~(parent[..., 0] > 0)).any()
        assert not found[:58].any()


def test_masks_of_implausible_size_come_last(tiny: SAMModel, image: np.ndarray) -> None:
    model = Offers(tiny, (LESION + 5.0, ORGAN))
    predictor = SlicePredictor(model, image[..., None], Settings(device="cpu"))
    found = nested_candidates(predictor, 0, POINT, AllowedRegion())
    limit = AllowedRegion().plausible_area(0, SHAPE)
    assert {c.area > limit for c in found} == {True, False}
    assert max(found, key=lambda c: c.score).area <= limit
    small = AllowedRegion(AutomaticMask(disc(12)[..., None].astype(np.float32), (*SHAPE, 1)))
    assert small.plausible_area(0, SHAPE) < disc(12).sum()


def test_a_setting_that_enlarges_nothing_leaves_the_masks_of_the_slice(tiny: SAMModel, image: np.ndarray) -> None:
    model = Offers(tiny, (LESION, ORGAN))
    predictor = SlicePredictor(model, image[..., None], Settings(device="cpu", sam_zoom=0))
    draw_first_click(predictor, 0, POINT, nested=True)
    assert model.zooms == [1.0]


def test_a_border_on_the_edge_is_clearer_than_one_beside_it(image: np.ndarray) -> None:
    ranks = gradient_ranks(image, full_crop(SHAPE))
    assert ranks.min() >= 0
    assert ranks.max() <= 1
    clear = {radius: border_clearness(disc(radius), ranks) for radius in (5, LESION, 15, 25)}
    assert max(clear, key=lambda radius: clear[radius]) == LESION
    ragged = disc(LESION) | (disc(LESION + 12) & (np.indices(SHAPE).sum(0) % 6 < 2))
    assert border_clearness(ragged, ranks) < clear[LESION]


def test_one_component_without_holes() -> None:
    probability = np.zeros((20, 20), np.float32)
    probability[2:9, 2:9] = 0.8
    probability[5, 5] = 0.1
    probability[12:15, 12:15] = 0.9
    found = one_component(probability, (3, 3))
    assert found[5, 5] >= 0.5
    assert not found[12:15, 12:15].any()
    assert np.isclose(found[2, 2], 0.8)
    assert not one_component(probability, (10, 10)).any()


def test_a_click_on_a_lesion_of_a_phantom_is_answered_with_the_lesion() -> None:
    """As shipped: small SAM, nothing fine-tuned."""
    settings = Settings(device="cpu")
    model, scores = load(small_sam(), settings), []
    for case in range(4):
        volume, classes = make_phantom(77, case, shape=(128, 128, 40))
        k = int((classes == 2).sum((0, 1)).argmax())
        depth = ndimage.distance_transform_edt(classes[..., k] == 2)
        i, j = (int(n) for n in np.unravel_index(int(depth.argmax()), depth.shape))
        lesion = one_component(np.float32(classes[..., k] == 2), (i, j)) > 0
        predictor = SlicePredictor(model, normalise(volume.array, settings), settings)
        drawn = ClickSession(predictor, nested=True).on_slice(parse({"foreground": [[i, j, k]]}, classes.shape))
        assert drawn is not None
        scores.append(dice(drawn[1], lesion))
    assert np.mean(scores) > 0.6, scores
