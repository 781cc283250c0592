"""The answers of a session: what is drawn, what is kept from earlier clicks, and what that costs."""

from __future__ import annotations

import numpy as np
import torch

from aslseg.prompts.from_client import parse
from aslseg.sam.clicks.click_history import clicks_of
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling.build import SAMModel
from click_scenes import clicks, dice, session, through
from seeing_sam import Sees

Scene = tuple[ClickSession, Sees, np.ndarray]


def test_one_click_grows_to_the_whole_object(scene: Scene) -> None:
    state, model, truth = scene
    mask = state.answer(clicks([[16, 14, 4]]))
    assert mask.dtype == np.uint8
    assert mask.shape == (40, 32, 9)
    assert dice(mask > 0, truth > 0) > 0.9
    assert not mask[..., [0, 8]].any()
    assert model.encoded <= 9


def test_the_second_click_encodes_nothing(scene: Scene) -> None:
    state, model, _ = scene
    state.answer(clicks([[16, 14, 4]]))
    before = model.encoded
    state.answer(clicks([[16, 14, 4], [18, 16, 4], [16, 14, 3]], [[2, 2, 4]]))
    assert model.encoded == before


def questions(asked: list[tuple]) -> list[tuple[list[int], bool, bool]]:
    """Of each question: labels of the points, whether it had a box, whether it had a mask."""
    return [
        ([] if points is None else points[1][0].tolist(), boxes is not None, masks is not None)
        for points, boxes, masks in asked
    ]


def test_click_by_click_with_the_answer_before_as_mask(scene: Scene) -> None:
    state, model, _ = scene
    state.on_slice(clicks([[16, 14, 4]]))
    assert questions(model.asked) == [([1], False, False)]
    state.on_slice(clicks([[16, 14, 4]], [[2, 5, 4]]))
    assert questions(model.asked[1:]) == [([1, 0], False, True)], "the first answer is remembered"
    state.on_slice(clicks([[16, 14, 4], [18, 14, 4]], [[2, 5, 4]]))
    assert questions(model.asked[2:]) == [([1, 0, 1], False, True)]
    state.on_slice(clicks([[16, 14, 4]], [[2, 5, 4]]))
    assert len(model.asked) == 3, "without the last click nothing is asked again"


def test_a_click_that_sam_contradicts_is_obeyed_and_the_next_pass_starts_from_there(scene: Scene) -> None:
    state, model, truth = scene
    drawn = state.on_slice(clicks([[16, 14, 4]]))[1]
    found = state.on_slice(clicks([[16, 14, 4]], [[16, 20, 4]]))[1]
    assert drawn[14:19, 20].all()
    assert not found[14:19, 20].any()
    assert found[16, 14]
    state.on_slice(clicks([[16, 14, 4], [12, 12, 4]], [[16, 20, 4]]))
    masked = model.asked[-1][2][0, 0]
    assert masked[round(16 * 32 / 40), round(20 * 32 / 40)] < 0, "in SAM's low-res frame"
    assert truth[16, 20, 4]


def test_an_obeyed_click_draws_nothing_outside_the_box(scene: Scene) -> None:
    state, _, truth = scene
    found = state.on_slice(clicks([[16, 14, 4], [32, 14, 4]], roi=[4, 33, 2, 26, 4, 4]))[1]
    assert not truth[32, 14, 4]
    assert found[30:34, 14].all()
    assert not found[34:].any()


def test_a_box_is_asked_with_its_answer_once_more_and_stays_with_clicks(scene: Scene) -> None:
    state, model, _ = scene
    box = {"roi": [4, 28, 2, 26, 4, 4]}
    state.on_slice(clicks([], **box))
    assert questions(model.asked) == [([], True, False), ([], True, True)], "with itself as mask once more"
    del model.asked[:]
    state.on_slice(clicks([[16, 14, 4]], [[2, 5, 4]], **box))
    assert questions(model.asked) == [([1], True, False), ([1, 0], True, True)]
    assert len({tuple(boxes[0].tolist()) for _, boxes, _ in model.asked}) == 1


def test_many_clicks_are_taken_one_by_one_up_to_eight_then_in_groups(scene: Scene) -> None:
    state, model, _ = scene
    spots = [[16, n, 4] for n in range(6, 26)]
    at_once = state.on_slice(clicks(spots))[1]
    assert [len(labels) for labels, _, _ in questions(model.asked)] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 20]
    asked = [points[0] for points, _, _ in model.asked]
    other = session(model, state.predictor.source.volume)
    for n in range(1, 21):
        del model.asked[:]
        one_by_one = other.on_slice(clicks(spots[:n]))[1]
        assert len(model.asked) <= 2
    assert np.array_equal(model.asked[-1][0][0], asked[-1])
    assert np.array_equal(one_by_one, at_once)


def test_a_neighbour_is_asked_with_box_point_and_mask_and_its_own_negative_clicks(scene: Scene) -> None:
    state, model, _ = scene
    state.answer(clicks([[16, 14, 4]], [[2, 5, 5]]))
    (_, labels), boxes, masks = model.asked[1]  # slice 5 comes first
    assert labels.tolist() == [[1, 0]]
    assert boxes is not None
    assert masks is not None


def test_a_box_alone_starts_in_its_middle_and_bounds_the_object(scene: Scene) -> None:
    state, _, truth = scene
    mask = state.answer(parse({"roi": [28, 4, 26, 2, 5, 3]}, (40, 32, 9)))
    assert mask[..., 3:6].any((0, 1)).all()
    assert not mask[..., :3].any()
    assert not mask[..., 6:].any()
    assert dice(mask[..., 4] > 0, truth[..., 4] > 0) > 0.85
    small = state.answer(parse({"roi": [12, 20, 10, 18, 4, 4]}, (40, 32, 9)))
    assert small.any((0, 1)).sum() == 1


def test_background_clicks_alone_give_nothing(scene: Scene) -> None:
    state, model, _ = scene
    assert not state.answer(clicks([], [[16, 14, 4]])).any()
    assert not state.answer(clicks([])).any()
    assert model.encoded == 0


def test_answers_depend_on_the_clicks_alone(scene: Scene) -> None:
    state, _, _ = scene
    first = state.answer(clicks([[16, 14, 4]]))
    state.answer(clicks([[30, 28, 2]]))
    assert np.array_equal(state.answer(clicks([[16, 14, 4]])), first)


def test_what_grows_from_two_clicks_meets_half_way_or_where_one_of_them_ends(tube: ClickSession) -> None:
    answer = tube.draw(through([[16, 14, 2], [16, 14, 9]]))
    assert answer.volume().any((0, 1))[:12].all()
    model = tube.predictor.model
    del model.asked[:]
    both = session(model, tube.predictor.source.volume).answer(through([[16, 14, 3], [16, 14, 14]]))
    assert both.any((0, 1)).tolist() == [k != 12 for k in range(20)]
    assert len(model.asked) <= 21, "no slice is drawn twice; number 12 is tried from both sides"


def test_a_click_beyond_the_end_of_the_object_deletes_nothing_of_it(tube: ClickSession) -> None:
    first = tube.answer(through([[16, 14, 3]]))
    assert first.any((0, 1)).tolist() == [k < 12 for k in range(20)]
    both = tube.answer(through([[16, 14, 3], [16, 14, 14]]))
    assert both.any((0, 1)).tolist() == [k != 12 for k in range(20)]
    assert np.array_equal(both[..., :12], first[..., :12])


def test_a_click_after_a_box_on_another_slice_corrects_what_the_box_gave(tube: ClickSession) -> None:
    box = {"roi": [6, 27, 4, 25, 0, 11]}
    first = tube.answer(through([], **box))
    asked = len(tube.predictor.model.asked)
    after = tube.answer(through([[16, 14, 10]], **box))
    assert len(tube.predictor.model.asked) - asked <= 4
    assert np.array_equal(after[..., :9], first[..., :9])


def test_a_click_outside_the_slices_of_the_box_draws_on_its_own_slice_alone(tube: ClickSession) -> None:
    box = {"roi": [6, 27, 4, 25, 2, 5]}
    tube.answer(through([], **box))
    mask = tube.answer(through([[16, 14, 9]], **box))
    assert np.flatnonzero(mask.any((0, 1))).tolist() == [2, 3, 4, 5, 9]


def test_a_background_click_on_a_grown_slice_is_obeyed_with_a_disc(tube: ClickSession) -> None:
    before = tube.answer(through([[16, 14, 3]]))
    after = tube.answer(through([[16, 14, 3]], [[16, 20, 6]]))
    assert before[14:19, 20, 6].all()
    assert not after[14:19, 20, 6].any()
    assert after[16, 10, 6]
    assert np.array_equal(after[..., 3], before[..., 3])


def test_a_volume_of_one_slice(tiny: SAMModel) -> None:
    image = np.zeros((20, 20, 1), np.float32)
    image[5:15, 5:15] = 1
    state = session(Sees(tiny), image)
    assert state.answer(parse({"foreground": [[10, 10, 0]]}, image.shape)).sum() > 80


def test_a_wrong_automatic_mask_is_repaired_where_it_is_clicked(scene: Scene) -> None:
    """Too large on slice 4, right elsewhere, with a second component that nobody clicks on."""
    state, model, truth = scene
    region = (truth > 0).astype(np.float32)
    region[2:30, 2:28, 4] = 1
    region[34:38, 26:30, 3:6] = 1
    repair = session(model, state.predictor.source.volume, region)
    mask = repair.answer(clicks([], [[4, 4, 4]])) > 0
    assert dice(mask[:30, :28, 4], truth[:30, :28, 4] > 0) > 0.85
    assert mask[34:38, 26:30, 3:6].all(), "the other component stays"
    for k in (0, 1, 2, 6, 7, 8):
        assert np.array_equal(mask[..., k], region[..., k] > 0), "a right slice stays as it is"
    assert np.array_equal(repair.answer(clicks([])), (region > 0).astype(np.uint8)), "without a click all stays"


def test_a_box_around_two_right_lesions_keeps_the_smaller_one(scene: Scene) -> None:
    state, model, truth = scene
    image, region = state.predictor.source.volume.copy(), (truth > 0).astype(np.float32)
    for array, value in ((image, 0.8), (region, 1)):
        array[31:37, 22:28] = value
    repair = session(model, image, region)
    mask = repair.answer(clicks([], roi=[2, 39, 2, 30, 2, 6])) > 0
    assert dice(mask[30:, 21:, 4], region[30:, 21:, 4] > 0) > 0.6
    alone = session(model, image).answer(clicks([], roi=[2, 39, 2, 30, 4, 4]))
    assert not alone[31:37, 22:28].any(), "without an automatic mask it is a stray"


def test_an_automatic_mask_may_be_taken_away_altogether(scene: Scene) -> None:
    state, model, _ = scene

    class Blind(Sees):
        def decode(self, embeddings, points=None, boxes=None, masks=None, multimask=False):
            logits, iou = super().decode(embeddings, points, boxes, masks, multimask)
            return torch.full_like(logits, -9), iou

    wrong = np.zeros(state.predictor.source.shape, np.float32)
    wrong[2:8, 2:8, 4] = 1
    repaired = session(Blind(model), state.predictor.source.volume, wrong)
    assert not repaired.answer(clicks([], [[4, 4, 4]])).any()


def test_background_clicks_beside_the_automatic_mask_draw_nothing_new(scene: Scene) -> None:
    """The click that hit it is so old that it counts no more: SAM would be asked for nothing in particular."""
    state, model, _ = scene
    wrong = np.zeros(state.predictor.source.shape, np.float32)
    wrong[2:8, 2:8, 4] = 1
    repaired = session(model, state.predictor.source.volume, wrong)
    beside = [[i, j, 4] for i in range(30, 38) for j in range(20, 28)]
    k, mask = repaired.on_slice(clicks([], [[4, 4, 4], *beside]))
    assert k == 4
    assert np.array_equal(mask, wrong[..., 4] > 0)
    assert not model.asked


def test_a_click_on_what_was_missed_is_added_to_the_automatic_mask(scene: Scene) -> None:
    state, model, truth = scene
    region = np.zeros(truth.shape, np.float32)
    region[34:38, 26:30, :] = 1
    mask = session(model, state.predictor.source.volume, region).answer(clicks([[16, 14, 4]]))
    assert mask[34:38, 26:30].all()
    assert dice(mask[:30] > 0, truth[:30] > 0) > 0.85


def test_a_click_on_what_is_lacking_is_not_asked_with_the_mask_of_a_false_blob(scene: Scene) -> None:
    """One slice with a click outside, on a blob that is no part of the object, and one inside, beside it."""
    state, model, truth = scene
    region = np.zeros(truth.shape, np.float32)
    region[34:38, 26:30, :] = 1
    repair = session(model, state.predictor.source.volume, region)
    mask = repair.answer(clicks([[16, 14, 4]], [[36, 28, 4]])) > 0
    starts = [masks for (_, labels), _, masks in model.asked if labels.tolist() == [[1]]]
    assert starts[:1] == [None], "the object is drawn without the blob as mask prompt"
    assert not mask[36, 28, 4]
    assert dice(mask[:30, :, 4], truth[:30, :, 4] > 0) > 0.85


def test_a_correction_touches_only_what_it_changes(scene: Scene) -> None:
    state, model, _ = scene
    before = state.answer(clicks([[16, 14, 4]]))
    asked = len(model.asked)
    # a background click far from the object changes nothing: its slice and the two beside it are asked again, no more
    after = state.answer(clicks([[16, 14, 4]], [[38, 30, 6]]))
    assert len(model.asked) - asked <= 2
    assert np.array_equal(after, before)


def test_a_shorter_list_is_undo_and_costs_nothing(scene: Scene) -> None:
    state, model, _ = scene
    first = state.answer(clicks([[16, 14, 4]]))
    state.answer(clicks([[16, 14, 4], [20, 20, 2]], [[2, 2, 4]]))
    asked = len(model.asked)
    assert np.array_equal(state.answer(clicks([[16, 14, 4]])), first)
    assert len(model.asked) == asked


def test_with_a_time_limit_the_clicked_slice_comes_first_and_the_rest_later(scene: Scene) -> None:
    state, model, _ = scene
    now = session(model, state.predictor.source.volume, first_click_seconds=0, click_seconds=0)
    answer = now.draw(clicks([[16, 14, 4]]), time_limited=True)
    partial, whole = answer.volume(), state.answer(clicks([[16, 14, 4]]))
    assert not answer.done
    assert np.array_equal(partial[..., 4], whole[..., 4])
    filled = partial.any((0, 1))
    assert np.array_equal(partial[..., filled], whole[..., filled])
    assert not partial.all((0, 1)).all()
    while answer.advance():
        pass
    assert np.array_equal(now.draw(clicks([[16, 14, 4]]), time_limited=True).volume(), whole)
    further = now.draw(clicks([[16, 14, 4]], [[2, 2, 4]]), time_limited=True)
    assert further.volume().any((0, 1)).sum() == whole.any((0, 1)).sum(), "what was there stays until it is redrawn"


def test_an_annotator_is_never_answered_with_another_ones_clicks(scene: Scene) -> None:
    """Even if both share one state: only answers to a part of the same clicks are built upon."""
    state, _, _ = scene
    image = state.predictor.source.volume.copy()
    image[33:39, 25:31, 1:8] = 0.9

    class Near(Sees):
        """Answers with the bright thing nearest to the first click."""

        def decode(self, embeddings, points=None, boxes=None, masks=None, multimask=False):
            logits, iou = super().decode(embeddings, points, boxes, masks, multimask)
            rows = torch.arange(logits.shape[2])[:, None] * 2
            for n, (spots, labels) in enumerate(zip(*points, strict=True)):
                x, y = spots[labels == 1][0]
                columns = torch.arange(logits.shape[3])[None] * 2
                far = (rows - y).abs() + (columns - x).abs() > 14
                logits[n, 0][far] = -30
            return logits, iou

    near = Near(state.predictor.model)
    shared = session(near, image)
    alone = session(near, image)
    one = shared.answer(clicks([[16, 14, 4]]))
    other = shared.answer(clicks([[36, 28, 4]]))
    assert np.array_equal(other, alone.answer(clicks([[36, 28, 4]])))
    assert not (one & other).any()
    assert other[36, 28, 4]


def test_ten_thousand_clicks_count_by_their_last(scene: Scene) -> None:
    state, model, truth = scene
    rng = np.random.default_rng(0)
    many = rng.integers(0, (40, 32, 9), (10_000, 3))
    inside = truth[tuple(many.T)] > 0
    prompt = clicks(many[inside].tolist(), many[~inside].tolist())
    mask = state.answer(prompt)
    left = state.without_last(prompt, 3)
    assert len(clicks_of(left)) == len(clicks_of(prompt)) - 3
    assert dice(mask > 0, truth > 0) > 0.9
    assert max(labels.shape[1] for (_, labels), _, _ in model.asked) <= 128


def test_the_slice_alone_for_a_2d_model(scene: Scene) -> None:
    state, _, truth = scene
    k, mask = state.on_slice(clicks([[16, 14, 4], [16, 14, 3]], slice=4))
    assert k == 4
    assert dice(mask, truth[..., 4] > 0) > 0.85
    assert state.on_slice(clicks([[16, 14, 4], [16, 14, 3]]))[0] == 3
    assert state.on_slice(clicks([], [[2, 2, 4]])) is None
    assert state.on_slice(parse({"roi": [2, 30, 2, 28, 5, 5], "slice": 812.5}, (40, 32, 9)))[0] == 5


def test_a_flat_roi_is_answered_or_left_out(scene: Scene) -> None:
    state, _, _ = scene
    assert not state.answer(parse({"roi": [16, 16, 14, 14, 4, 4]}, (40, 32, 9))).any()
    line = state.answer(parse({"roi": [16, 16, 4, 24, 2, 6]}, (40, 32, 9)))
    near = range(9, 24)  # ten pixels of the input, which has 1.6 for one of the slice
    assert set(np.flatnonzero(line.any((1, 2)))) <= set(near)


class Patchy(Sees):
    """Draws a small disc around a lone click, as of a small object, and what is bright otherwise."""

    def decode(self, embeddings, points=None, boxes=None, masks=None, multimask=False):
        logits, iou = super().decode(embeddings, points, boxes, masks, multimask)
        if boxes is None and masks is None and points is not None and points[0].shape[1] == 1:
            rows, columns = torch.arange(logits.shape[2])[:, None] * 2, torch.arange(logits.shape[3])[None] * 2
            for n, (spots, _) in enumerate(zip(*points, strict=True)):
                near = (rows - spots[0, 1]).square() + (columns - spots[0, 0]).square() < 16
                logits[n, 0] = torch.where(near, 9.0, -9.0)
        return logits, iou


def test_a_click_on_a_grown_slice_adds_to_what_has_grown_there(tube: ClickSession) -> None:
    box = {"roi": [6, 39, 4, 31, 0, 11]}
    state = session(Patchy(tube.predictor.model), tube.predictor.source.volume)
    first = state.answer(through([], **box))
    assert first[..., :12].any((0, 1)).all()
    missed = [32, 15, 8]
    assert not first[tuple(missed)]
    asked = len(state.predictor.model.asked)
    after = state.answer(through([missed], **box))
    assert after[tuple(missed)]
    assert (after[..., 8] >= first[..., 8]).all()
    assert np.array_equal(after[..., :6], first[..., :6])
    assert len(state.predictor.model.asked) - asked < 10
    inside = state.answer(through([missed, [16, 14, 10]], **box))
    assert dice(inside[..., 10] > 0, first[..., 10] > 0) > 0.9, "a click inside prompts with the mask that was there"
    state.answer(through([missed, [16, 14, 10]], [[16, 20, 8]], **box))
    again = state.answer(through([missed], **box))
    assert np.array_equal(again, after)
