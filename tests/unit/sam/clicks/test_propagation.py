"""Propagation by itself: seeds and a predictor, no session."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from aslseg.sam.clicks.automatic_mask import AutomaticMask
from aslseg.sam.clicks.click_history import SlicedPrompt
from aslseg.sam.clicks.propagation import Front, Propagation, propagation_ranges
from aslseg.sam.clicks.slice_mask import SliceMask
from aslseg.sam.clicks.stop_rules import StopReason, StopRules
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.settings import Settings
from click_scenes import through
from seeing_sam import Sees

SHAPE = (40, 32, 10)


def column(*, dark: tuple[int, ...] = ()) -> np.ndarray:
    """A bright column of 18 x 18 pixels through ten slices, but not the dark ones."""
    image = np.full(SHAPE, 0.1, np.float32)
    image[8:26, 6:24] = 0.8
    image[..., list(dark)] = 0.1
    return image


def seed(image: np.ndarray, k: int) -> SliceMask:
    return SliceMask.of((image[..., k] > 0.5).astype(np.float32), 3)


@pytest.fixture
def grow(tiny: SAMModel, settings: Settings) -> Callable[..., Propagation]:
    """Propagates from seed slices of an image to the end."""

    def run(image: np.ndarray, *seeds: int, **more: object) -> Propagation:
        found = Propagation(SlicePredictor(Sees(tiny), image, settings), {k: seed(image, k) for k in seeds}, **more)
        while found.advance():
            pass
        assert found.done
        return found

    return run


def reasons(found: Propagation) -> dict[tuple[int, int], StopReason]:
    return {(s.k, s.step): s.reason for s in found.stops}


def test_ranges_go_to_the_next_seed_and_stay_within_the_extent() -> None:
    def ranges(seeds: list[int], extent: tuple[int, int]) -> list[tuple[int, int, int]]:
        return [(f.k, f.step, f.last) for f in propagation_ranges(seeds, extent)]

    assert ranges([2, 7], (0, 9)) == [(2, 1, 6), (2, -1, 0), (7, 1, 9), (7, -1, 3)]
    assert ranges([3, 4], (0, 9)) == [(3, 1, 3), (3, -1, 0), (4, 1, 9), (4, -1, 4)]
    assert ranges([1, 5, 9], (3, 7)) == [(5, 1, 7), (5, -1, 3)]
    assert ranges([], (0, 9)) == []
    assert Front(2, 1, 6) == next(propagation_ranges([2, 7], (0, 9)))


def test_through_the_volume_to_both_ends(grow: Callable[..., Propagation]) -> None:
    found = grow(column(), 4)
    assert found.volume().any((0, 1)).all()
    assert reasons(found) == {(9, 1): StopReason.VOLUME_END, (0, -1): StopReason.VOLUME_END}


def test_where_sam_does_not_trust_its_mask(grow: Callable[..., Propagation]) -> None:
    found = grow(column(dark=(7,)), 4)
    assert np.flatnonzero(found.volume().any((0, 1))).tolist() == list(range(7))
    assert reasons(found)[6, 1] is StopReason.PREDICTED_IOU
    assert found.mask(8) is None


def test_where_the_object_has_moved_away(grow: Callable[..., Propagation]) -> None:
    image = column()
    image[..., 6:] = 0.1
    image[30:38, 26:31, 6:] = 0.8
    assert reasons(grow(image, 4))[5, 1] is StopReason.NO_OVERLAP


def test_where_the_area_jumps(grow: Callable[..., Propagation]) -> None:
    image = column()
    image[..., 6:] = 0.8
    found = grow(image, 4)
    assert reasons(found)[5, 1] is StopReason.AREA
    assert reasons(grow(image, 4, rules=StopRules(area_ratio=9)))[9, 1] is StopReason.VOLUME_END


def test_where_the_tissue_is_another(grow: Callable[..., Propagation]) -> None:
    image = column()
    image[8:26, 6:24, 6:] = 0.95
    assert reasons(grow(image, 4))[5, 1] is StopReason.INTENSITY


def test_the_box_ends_it_in_all_directions(grow: Callable[..., Propagation]) -> None:
    prompt = SlicedPrompt(through(roi=[8, 20, 6, 20, 3, 6]))
    found = grow(column(), 4, prompt=prompt)
    assert np.flatnonzero(found.volume().any((0, 1))).tolist() == [3, 4, 5, 6]
    assert reasons(found) == {(6, 1): StopReason.BOX_END, (3, -1): StopReason.BOX_END}
    assert not found.mask(5)[21:].any()


def test_two_seeds_meet(grow: Callable[..., Propagation]) -> None:
    found = grow(column(), 2, 7)
    assert sorted(found.masks) == list(range(10))
    middle = {place: reason for place, reason in reasons(found).items() if place[0] not in (0, 9)}
    assert len(middle) == 2
    assert set(middle.values()) == {StopReason.MET_NEIGHBOUR}
    assert reasons(grow(column(), 4, 5))[4, 1] is StopReason.MET_NEIGHBOUR


def test_one_seed_goes_on_where_the_other_has_ended(grow: Callable[..., Propagation]) -> None:
    image = column(dark=(3,))
    found = grow(image, 2, 7)
    assert found.volume().any((0, 1)).tolist() == [k != 3 for k in range(10)]
    assert len(found.predictor.model.asked) == 9, "slice 3 is tried from both sides, all others once"


def test_a_repair_ends_where_the_automatic_mask_is_right(grow: Callable[..., Propagation]) -> None:
    image, automatic = column(), (column() > 0.5).astype(np.float32)
    automatic[8:26, 6:30, 4:6] = 1
    found = grow(image, 4, automatic=AutomaticMask(automatic, SHAPE))
    assert reasons(found) == {(5, 1): StopReason.AGREES, (4, -1): StopReason.AGREES}
    assert not found.mask(5)[:, 25:].any()
    assert np.array_equal(found.mask(0), automatic[..., 0] > 0), "the automatic mask stays"
    assert found.slices() == list(range(10))


def test_where_the_automatic_mask_lacked_the_object_it_goes_on_from_where_it_has_it(
    grow: Callable[..., Propagation],
) -> None:
    """Components that nobody clicked on stay, also where the object grows into them; before, they were lost."""
    image, automatic = column(), np.zeros(SHAPE, np.float32)
    automatic[10:28, 6:24, 6:] = 1
    automatic[1:4, 1:4, :] = 1
    lacking = seed(image, 3)
    blob = automatic[..., 3] > 0
    state = SliceMask.of(lacking.drawn, 3, np.zeros_like(blob), blob)
    found = Propagation(
        SlicePredictor(grow(image, 3).predictor.model, image, Settings(sam_zoom=0, device="cpu")),
        {3: state},
        AutomaticMask(automatic, SHAPE),
    )
    while found.advance():
        pass
    assert reasons(found)[5, 1] is StopReason.MET_AUTOMATIC
    for k in range(6):
        assert found.mask(k)[12, 12], "drawn where the mask lacks it"
        assert not found.mask(k)[2, 2], "the component that was replaced goes on to be"
    assert np.array_equal(found.mask(8), automatic[..., 8] > 0)


def test_a_correction_stops_drawing_where_nothing_changes(grow: Callable[..., Propagation]) -> None:
    image = column()
    first = grow(image, 4)
    predictor, asked = first.predictor, len(first.predictor.model.asked)
    second = Propagation(predictor, {4: seed(image, 4)}, earlier=first)
    while second.advance():
        pass
    assert len(predictor.model.asked) - asked == 2, "only the neighbours of the new seed"
    assert np.array_equal(second.volume(), first.volume())
    third = Propagation(predictor, {4: second.masks[4]}, earlier=second)
    while third.advance():
        pass
    assert len(predictor.model.asked) - asked == 2
    assert reasons(third) == reasons(first)


def test_before_it_ends_it_shows_what_it_corrects(grow: Callable[..., Propagation]) -> None:
    image = column()
    first = grow(image, 4)
    second = Propagation(first.predictor, {4: seed(image, 4)}, earlier=first)
    assert not second.done
    assert np.array_equal(second.volume(), first.volume())
    assert sorted(second.known()) == list(range(10))


def test_clicks_on_other_slices_count_there(grow: Callable[..., Propagation]) -> None:
    found = grow(column(), 4, prompt=SlicedPrompt(through([], [[16, 20, 6]])))
    assert not found.mask(6)[14:19, 20].any()
    assert found.mask(6)[16, 10]
    assert found.mask(5)[16, 20]


def test_a_step_that_fails_can_be_repeated(tiny: SAMModel, settings: Settings) -> None:
    image, model = column(), Sees(tiny)
    found = Propagation(SlicePredictor(model, image, settings), {4: seed(image, 4)})
    decode, failing = model.decode, [True]

    def broken(*args: object, **more: object) -> object:
        if failing:
            failing.pop()
            raise RuntimeError("out of memory")
        return decode(*args, **more)

    model.decode = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        found.advance()
    while found.advance():
        pass
    assert found.volume().any((0, 1)).all()


def test_without_seeds_there_is_nothing_to_do(tiny: SAMModel, settings: Settings) -> None:
    found = Propagation(SlicePredictor(Sees(tiny), column(), settings), {})
    assert found.done
    assert not found.advance()
    assert found.expected_seconds() == 0
    assert not found.volume().any()
