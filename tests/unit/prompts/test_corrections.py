from __future__ import annotations

import numpy as np
import pytest

from aslseg.prompts.corrections import enforce_clicks, remove_stray_components


def disc(shape: tuple[int, int], i: float, j: float, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.hypot(rows - i, columns - j) <= radius


def ask(mask: np.ndarray, *clicks: tuple[int, int, int]) -> np.ndarray:
    points = np.array([(x, y) for x, y, _ in clicks], float).reshape(-1, 2)
    return enforce_clicks(mask.astype(np.float32), points, np.array([label for *_, label in clicks], int))


def test_clicks_that_agree_change_nothing() -> None:
    drawn = disc((60, 80), 30, 40, 12).astype(np.float32)
    points, labels = np.array([[40.0, 30.0], [5.0, 5.0]]), np.array([1, 0])
    assert enforce_clicks(drawn, points, labels) is drawn
    assert enforce_clicks(drawn, points[:0], labels[:0]) is drawn


def test_a_false_half_goes_as_far_as_it_is_deep() -> None:
    truth, drawn = disc((90, 90), 30, 30, 15), disc((90, 90), 30, 30, 15) | disc((90, 90), 62, 62, 14)
    found = ask(drawn, (30, 30, 1), (62, 62, 0)) >= 0.5
    wrong = disc((90, 90), 62, 62, 14)
    assert (found & wrong).sum() < 0.2 * wrong.sum()
    assert np.array_equal(found & truth, truth)


def test_what_was_missed_is_added_up_to_the_drawn_border() -> None:
    found = ask(disc((90, 90), 45, 30, 20), (60, 45, 1)) >= 0.5  # ten pixels to the right of what was drawn
    added = found & ~disc((90, 90), 45, 30, 20)
    assert disc((90, 90), 45, 60, 8)[~added].sum() == 0
    assert not (added & ~disc((90, 90), 45, 60, 11)).any()


def test_a_far_click_adds_no_more_than_was_drawn() -> None:
    drawn = disc((200, 200), 30, 30, 6)
    added = (ask(drawn, (150, 150, 1)) >= 0.5) & ~drawn
    assert added[150, 150]
    assert added.sum() <= 1.3 * drawn.sum()


def test_two_kinds_of_clicks_meet_half_way() -> None:
    found = ask(disc((90, 90), 45, 30, 20), (70, 45, 1), (76, 45, 0)) >= 0.5
    assert found[45, 70]
    assert found[45, 72]
    assert not found[45, 74]


def test_nothing_says_nothing_about_size() -> None:
    empty = np.zeros((40, 40), np.float32)
    assert enforce_clicks(empty, np.array([[20.0, 20.0]]), np.array([1])) is empty


@pytest.mark.parametrize("seed", range(20))
def test_every_click_is_obeyed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.random((12, 12)).repeat(6, 0).repeat(6, 1)
    paths = rng.permutation(144)[:6]
    clicks = [
        (6 * int(p % 12) + 3, 6 * int(p // 12) + 3, int(label))
        for p, label in zip(paths, rng.integers(0, 2, 6), strict=True)
    ]
    found = ask(drawn, *clicks)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    for x, y, label in clicks:
        assert (found[y, x] >= 0.5) == bool(label)


def test_a_whole_slice_may_be_wrong() -> None:
    assert not (ask(np.ones((30, 30)), (15, 15, 0)) >= 0.5)[15, 15]


def test_small_pieces_go_unless_clicked_or_large() -> None:
    large, half, small = disc((90, 90), 25, 25, 14), disc((90, 90), 65, 65, 10), disc((90, 90), 20, 70, 4)
    drawn = (large | half | small).astype(np.float32) * np.float32(0.8)
    nowhere = np.zeros((0, 2)), np.zeros(0, int)
    assert np.array_equal(remove_stray_components(drawn, *nowhere) > 0, large | half)
    inside = np.array([[70.0, 20.0]])
    assert remove_stray_components(drawn, inside, np.array([1])) is drawn
    assert np.array_equal(remove_stray_components(drawn, inside, np.array([0])) > 0, large | half)


def test_one_piece_and_none_stay_as_they_are() -> None:
    nowhere = np.zeros((0, 2)), np.zeros(0, int)
    for drawn in (disc((40, 40), 20, 20, 8).astype(np.float32), np.zeros((40, 40), np.float32)):
        assert remove_stray_components(drawn, *nowhere) is drawn
    faint = np.full((40, 40), np.float32(0.3))
    assert remove_stray_components(faint, *nowhere) is faint
