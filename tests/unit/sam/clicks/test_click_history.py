from __future__ import annotations

import numpy as np

from aslseg.prompts.from_client import ClientPrompt
from aslseg.sam.clicks.click_history import Click, ClickHistory, SlicedPrompt, clicks_of
from click_scenes import clicks


def test_a_prompt_slice_by_slice() -> None:
    prompt = SlicedPrompt(clicks([[16, 14, 4], [10, 9, 3]], [[2, 5, 4]], roi=[1, 30, 2, 20, 3, 6]))
    points, labels = prompt.points(4)
    assert points.tolist() == [[14, 16], [5, 2]]
    assert labels.tolist() == [1, 0]
    assert len(prompt.points(5)[0]) == 0
    assert (prompt.box, prompt.extent) == ((2, 1, 21, 31), (3, 6))
    assert Click(1, 10, 9, 3) in prompt.clicks


def test_an_empty_prompt() -> None:
    prompt = SlicedPrompt(ClientPrompt())
    assert (prompt.box, prompt.extent, prompt.clicks) == (None, None, frozenset())
    assert [a.shape for a in prompt.points(0)] == [(0, 2), (0,)]


def test_the_last_64_clicks_of_each_kind_on_a_slice_count() -> None:
    many = [[i, j, 4] for i in range(10) for j in range(10)]
    points, labels = SlicedPrompt(clicks(many, [[20, 20, 4]])).points(4)
    assert (len(points), labels.sum()) == (65, 64)
    assert points[0].tolist() == [6, 3]


def test_slices_with_other_clicks() -> None:
    one, other = SlicedPrompt(clicks([[1, 1, 2], [1, 1, 3]])), SlicedPrompt(clicks([[1, 1, 3]], [[1, 1, 5]]))
    assert other.changed_slices(one) == one.changed_slices(other) == {2, 5}
    assert one.changed_slices(one) == set()


def test_the_order_survives_requests_that_leave_clicks_out() -> None:
    history = ClickHistory()
    history.add(clicks([[16, 14, 4]]))
    history.add(clicks([[16, 14, 4]], [[2, 2, 4]]))
    history.add(clicks([[5, 5, 7]]))
    points, labels = history.add(clicks([[16, 14, 4], [18, 15, 4]], [[2, 2, 4]])).points(4)
    assert labels.tolist() == [1, 0, 1]
    assert points[1].tolist() == [2, 2]
    left = history.without_last(clicks([[16, 14, 4], [18, 15, 4]], [[2, 2, 4]]), 1)
    assert (left.foreground.tolist(), left.background.tolist()) == ([[16, 14, 4]], [[2, 2, 4]]), (
        "the clicks on slice 7 were not sent and are not undone"
    )


def test_undo_takes_the_last_clicks_of_both_kinds_then_the_box() -> None:
    history = ClickHistory()
    history.add(clicks([[16, 14, 4]]))
    history.add(clicks([[16, 14, 4]], [[2, 2, 4]]))
    complete = clicks([[16, 14, 4], [18, 15, 3]], [[2, 2, 4]], roi=[0, 39, 0, 31, 0, 8])
    one, two = history.without_last(complete, 1), history.without_last(complete, 2)
    assert (one.foreground.tolist(), one.background.tolist()) == ([[16, 14, 4]], [[2, 2, 4]])
    assert (two.foreground.tolist(), two.background.tolist()) == ([[16, 14, 4]], [])
    assert two.box is not None
    assert history.without_last(complete, 4).empty
    assert np.array_equal(complete.foreground, [[16, 14, 4], [18, 15, 3]]), "the request itself is not changed"


def test_more_clicks_than_are_remembered() -> None:
    voxels = np.array(list(np.ndindex(40, 32, 20)), np.int64)
    history, prompt = ClickHistory(), ClientPrompt(voxels[:25_000])
    points, labels = history.add(prompt).points(0)
    assert len(points) == len(labels) == 64
    assert len(clicks_of(history.without_last(prompt, 3))) == 24_997
