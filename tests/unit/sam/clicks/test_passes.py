"""Which passes of SAM the clicks on one slice take, and how their answers become one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aslseg.sam.clicks.passes import ClickPass, MaskPrompt, ObjectSize, PassRunner, plan_passes
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.settings import Settings
from seeing_sam import Sees

NONE, START, PREVIOUS = MaskPrompt.NONE, MaskPrompt.START, MaskPrompt.PREVIOUS
SMALL, LARGE = ObjectSize.SMALL, ObjectSize.LARGE


def plan(labels: list[int], *, box: bool = False, start: bool = False, ellipses: bool = True) -> list[ClickPass]:
    return plan_passes(labels, box=box, start=start, ellipses=ellipses)


def shown(passes: list[ClickPass]) -> list[tuple[int, MaskPrompt]]:
    """Number of clicks and mask of the passes that always run."""
    return [(p.clicks, p.mask) for p in passes if p.only is None]


def test_clicks_are_taken_one_after_the_other_and_a_small_object_once_more() -> None:
    passes = plan([1, 0, 1])
    assert shown(passes) == [(1, NONE), (2, PREVIOUS), (3, PREVIOUS)]
    assert passes[3:] == [ClickPass(3, PREVIOUS, only=SMALL)]


def test_after_eight_clicks_they_are_taken_in_groups() -> None:
    assert [p.clicks for p in plan([1] * 20) if p.only is None] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 20]


def test_a_mask_that_is_repaired_prompts_the_first_pass() -> None:
    assert shown(plan([0], start=True)) == [(1, START)]
    assert shown(plan([1, 0], start=True)) == [(1, START), (2, PREVIOUS)]


def test_clicks_outside_alone_need_a_box_or_a_mask() -> None:
    assert plan([0, 0]) == []
    assert plan([]) == []
    assert shown(plan([0], box=True)) == [(0, NONE), (1, PREVIOUS)], "the box comes first"


def test_a_large_object_in_a_lone_box_is_the_mean_of_three_answers() -> None:
    first, again, plain = plan([], box=True)
    assert first == ClickPass(0, NONE)
    assert again == ClickPass(0, PREVIOUS, only=LARGE, averaged=True)
    assert plain == ClickPass(0, NONE, ellipse=False, only=LARGE, averaged=True)


def test_a_sam_without_ellipses_answers_a_box_twice_and_the_second_answer_counts() -> None:
    assert plan([], box=True, ellipses=False) == [ClickPass(0, NONE), ClickPass(0, PREVIOUS, only=LARGE)]


def test_a_box_with_further_clicks_or_a_mask_has_no_closing_pass() -> None:
    assert all(p.only is None for p in plan([1, 0], box=True))
    assert all(p.only is None for p in plan([1], box=True, start=True))


class Levels(Sees):
    """Answers the n-th question with a constant probability, the last one from then on."""

    def __init__(self, base: SAMModel, levels: list[float]) -> None:
        super().__init__(base)
        self.architecture = base.architecture.with_conventions(box_mask=True)
        self.levels = levels

    def decode(self, embeddings, points=None, boxes=None, masks=None, multimask=False):
        logits, iou = super().decode(embeddings, points, boxes, masks, multimask)
        level = self.levels[min(len(self.asked), len(self.levels)) - 1]
        return torch.full_like(logits, float(torch.logit(torch.tensor(level)))), iou


@pytest.fixture
def volume() -> np.ndarray:
    return np.full((40, 32, 2), 0.9, np.float32)


NO_CLICKS = np.zeros((0, 2)), np.zeros(0, int)
BOX = (2.0, 4.0, 27.0, 29.0)


def test_averaged_answers_become_their_mean_within_the_box(
    tiny: SAMModel, settings: Settings, volume: np.ndarray
) -> None:
    model = Levels(tiny, [0.45, 0.75, 0.7])
    found = PassRunner(SlicePredictor(model, volume, settings)).draw(0, BOX, *NO_CLICKS, None)
    assert np.allclose(found[4:29, 2:27], (0.45 + 0.75 + 0.7) / 3, atol=1e-5)
    assert found.astype(bool).sum() == 25 * 25
    masks = [m for _, _, m in model.asked]
    assert not torch.equal(masks[0], masks[1]), "first the ellipse, then the answer"
    assert masks[2] is None


def test_the_answer_to_the_first_clicks_is_remembered(tiny: SAMModel, settings: Settings, volume: np.ndarray) -> None:
    model = Levels(tiny, [0.9])
    runner = PassRunner(SlicePredictor(model, volume, settings))
    points, labels = np.array([[14.0, 16.0], [5.0, 2.0]]), np.array([1, 0])
    runner.draw(0, None, points[:1], labels[:1], None)
    runner.draw(0, None, points, labels, None)
    assert len(model.asked) == 2
    runner.draw(0, None, points[:1], labels[:1], None)
    assert len(model.asked) == 2, "undo"
    runner.draw(1, None, points[:1], labels[:1], None)
    runner.draw(0, None, points[:1], labels[:1], np.full((40, 32), 0.9, np.float32))
    assert len(model.asked) == 4, "another slice, and a mask that is repaired, have other answers"
    assert runner.bytes == 4 * 40 * 32 * 4
    for n in range(40):
        runner.draw(0, None, points[:1] + n % 7, labels[:1], np.full((40, 32), 0.5 + n / 100, np.float32))
    assert runner.bytes <= 32 * 40 * 32 * 8


def test_the_first_click_inside_leads(tiny: SAMModel, settings: Settings, volume: np.ndarray) -> None:
    model = Levels(tiny, [0.9])
    points, labels = np.array([[5.0, 2.0], [14.0, 16.0]]), np.array([0, 1])
    PassRunner(SlicePredictor(model, volume, settings)).draw(0, None, points, labels, None)
    assert [p[1][0].tolist() for p, _, _ in model.asked] == [[1], [1, 0]]


def test_clicks_outside_alone_draw_nothing(tiny: SAMModel, settings: Settings, volume: np.ndarray) -> None:
    model = Levels(tiny, [0.9])
    found = PassRunner(SlicePredictor(model, volume, settings)).draw(
        0, None, np.array([[5.0, 2.0]]), np.array([0]), None
    )
    assert not found.any()
    assert not model.asked
