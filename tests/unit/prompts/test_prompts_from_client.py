from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aslseg.errors import BadPromptError
from aslseg.prompts.from_client import parse

SHAPE = (100, 80, 40)


def test_slicer_deepgrow() -> None:
    prompt = parse({"label": "liver", "foreground": [[10, 20, 5], [11, 21, 5]], "background": [[0, 0, 5]]}, SHAPE)
    assert prompt.foreground.tolist() == [[10, 20, 5], [11, 21, 5]]
    assert prompt.background.tolist() == [[0, 0, 5]]
    assert (prompt.label, prompt.box, prompt.slice, prompt.notes) == ("liver", None, 5, ())
    assert not prompt.empty


def test_slicer_deepgrow_2d_sends_a_slice() -> None:
    assert parse({"foreground": [[1, 2, 7]], "background": [], "slice": 7}, SHAPE).slice == 7
    assert parse({"foreground": [[1, 2, 7]], "slice": 12}, SHAPE).slice == 7


def test_deepedit_sends_points_under_the_segments_name() -> None:
    request = {"label": "tumour", "liver": [[1, 1, 1]], "tumour": [[2, 3, 4]], "background": []}
    assert parse(request, SHAPE).foreground.tolist() == [[2, 3, 4]]


def test_ohif_deepgrow_without_foreground_or_label() -> None:
    prompt = parse({"background": [[1, 2, 3]], "result_compress": False}, SHAPE)
    assert prompt.foreground.shape == (0, 3)
    assert (prompt.slice, prompt.label) == (3, None)


def test_ohif_vista3d_points() -> None:
    request = {"points": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "point_labels": [1, 0, -1], "label_prompt": [2]}
    prompt = parse(request, SHAPE)
    assert prompt.foreground.tolist() == [[1, 2, 3]]
    assert prompt.background.tolist() == [[4, 5, 6]]


@pytest.mark.parametrize("request_", [{}, {"foreground": None, "background": None, "roi": None, "slice": None}])
def test_nothing_sent(request_: dict[str, Any]) -> None:
    prompt = parse(request_, SHAPE)
    assert prompt.empty
    assert prompt.slice is None
    assert prompt.notes == ()


def test_points_outside_are_left_out_with_a_note() -> None:
    prompt = parse({"foreground": [[-1, 0, 0], [99, 79, 39], [100, 0, 0], [5, 5, 5]]}, SHAPE)
    assert prompt.foreground.tolist() == [[99, 79, 39], [5, 5, 5]]
    assert prompt.notes == ("2 foreground point(s) outside the volume (100, 80, 40) were left out",)


def test_points_are_rounded() -> None:
    assert parse({"foreground": [[1.4, 2.6, 3.0]]}, SHAPE).foreground.tolist() == [[1, 3, 3]]


@pytest.mark.parametrize(
    ("roi", "box"),
    [
        ([10, 20, 30, 40, 5, 9], ((10, 20), (30, 40), (5, 9))),
        ([20, 10, 40, 30, 5, 9], ((10, 20), (30, 40), (5, 9))),
        ([-20, 300, 30, 40, 39, -5], ((0, 99), (30, 40), (0, 39))),
        ([10, 20, 30, 40, 5, 5], ((10, 20), (30, 40), (5, 5))),
    ],
)
def test_roi_is_sorted_and_cut(roi: list[float], box: tuple[tuple[int, int], ...]) -> None:
    prompt = parse({"roi": roi}, SHAPE)
    assert prompt.box == box
    assert bool(prompt.notes) == (min(roi) < 0)


@pytest.mark.parametrize("roi", [[10, 10, 30, 30, 5, 5], [10, 10, 30, 30, 5, 9], [0, 0, 0, 0, 0, 0]])
def test_roi_without_extent_is_left_out(roi: list[float]) -> None:
    prompt = parse({"roi": roi, "foreground": [[1, 2, 3]]}, SHAPE)
    assert prompt.box is None
    assert "no extent" in prompt.notes[0]
    assert prompt.foreground.tolist() == [[1, 2, 3]]


def test_slicer_deepgrow_as_it_is_sent() -> None:
    """Points of Foreground and Background widgets, then the model's config, the first of each list, then the result."""
    text = """{"label": "liver", "foreground": [[171, 213, 61], [180, 220, 61]], "background": [[-4, 30, 61]],
        "device": "cpu", "use_ssl": true, "whole": false, "result_extension": ".nrrd", "result_dtype": "uint8",
        "client_id": "user-xyz"}"""
    prompt = parse(json.loads(text), (512, 512, 160))
    assert prompt.foreground.tolist() == [[171, 213, 61], [180, 220, 61]]
    assert prompt.background.tolist() == []
    assert (prompt.label, prompt.slice, prompt.box) == ("liver", 61, None)
    assert prompt.notes == ("1 background point(s) outside the volume (512, 512, 160) were left out",)


def test_slicer_roi_of_an_lps_volume_with_a_2d_model() -> None:
    """Pairs per axis with i0 > i1 and j0 > j1, beyond the volume; the slice is round(abs(offset)) in millimetres."""
    text = """{"label": "liver", "foreground": [], "background": [], "roi": [401, 212, 530, 288, 55, 71],
        "slice": 812, "reset_state": true, "device": "cuda", "result_extension": ".nrrd", "result_dtype": "uint8"}"""
    prompt = parse(json.loads(text), (512, 512, 160))
    assert prompt.box == ((212, 401), (288, 511), (55, 71))
    assert prompt.slice == 63
    assert prompt.notes == ("the ROI was cut to the volume (512, 512, 160)",)


def test_slicer_multi_label_mode_sends_every_name_and_which_one() -> None:
    text = """{"liver": [[1, 2, 3]], "tumour": [[4, 5, 6], [7, 8, 9]], "label": "tumour", "result_dtype": "uint8"}"""
    prompt = parse(json.loads(text), SHAPE)
    assert (prompt.label, prompt.foreground.tolist()) == ("tumour", [[4, 5, 6], [7, 8, 9]])


def test_ohif_deepgrow_as_it_is_sent() -> None:
    """No label; without foreground the key is missing."""
    text = """{"foreground": [[100, 90, 30]], "background": [], "result_extension": ".nrrd", "result_dtype": "uint8",
        "result_compress": false, "restore_label_idx": false}"""
    prompt = parse(json.loads(text), (512, 512, 40))
    assert (prompt.foreground.tolist(), prompt.label, prompt.slice) == ([[100, 90, 30]], None, 30)
    only = parse(json.loads(text.replace('"foreground": [[100, 90, 30]], ', "").replace("[]", "[[1, 2, 3]]")), SHAPE)
    assert (len(only.foreground), only.background.tolist(), only.slice) == (0, [[1, 2, 3]], 3)


def test_roi_outside_is_left_out() -> None:
    prompt = parse({"roi": [200, 300, 0, 10, 0, 10]}, SHAPE)
    assert prompt.box is None
    assert "outside the volume" in prompt.notes[0]
    assert prompt.empty


@pytest.mark.parametrize(("sent", "expected"), [(7, 7), (212.5, 8), (-3, 8), (None, 8)])
def test_slice_in_millimetres_gives_way_to_the_middle_of_the_roi(sent: float | None, expected: int) -> None:
    assert parse({"roi": [1, 9, 1, 9, 6, 10], "slice": sent}, SHAPE).slice == expected


def test_slice_alone_is_clamped() -> None:
    prompt = parse({"slice": 120}, SHAPE)
    assert prompt.slice == 39
    assert prompt.notes
    assert parse({"slice": 12}, SHAPE).slice == 12


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"foreground": "[[1,2,3]]"}, "foreground: expected a list"),
        ({"foreground": [1, 2, 3]}, "three numbers"),
        ({"foreground": [[1, 2]]}, "three numbers"),
        ({"foreground": [["1", "2", "3"]]}, "finite numbers"),
        ({"foreground": [[1, float("nan"), 3]]}, "finite numbers"),
        ({"background": [[1, float("inf"), 3]]}, "background: expected finite"),
        ({"foreground": [[True, 1, 2]]}, "finite numbers"),
        ({"foreground": [[None, 1, 2]]}, "finite numbers"),
        ({"foreground": {"a": 1}}, "expected a list"),
        ({"roi": [1, 2, 3]}, "six numbers"),
        ({"roi": [[1, 2, 3, 4, 5, 6]]}, "roi"),
        ({"roi": "box"}, "roi: expected a list"),
        ({"slice": "middle"}, "slice: expected a number"),
        ({"slice": float("nan")}, "slice: expected a number"),
        ({"label": 3}, "label: expected the name"),
        ({"points": [[1, 2, 3]]}, "0 labels for 1 points"),
        ({"points": [[1, 2, 3]], "point_labels": [7]}, "expected 1"),
        ({"label_prompt": [1.5]}, "label values"),
        ({"label": "liver", "liver": ["here"]}, "foreground: expected points"),
    ],
)
def test_what_cannot_be_understood_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(BadPromptError, match=message):
        parse(request_, SHAPE)


def test_ten_thousand_clicks() -> None:
    clicks = np.random.default_rng(0).integers(-10, 110, (10_000, 3)).tolist()
    assert len(parse({"foreground": clicks}, SHAPE).foreground) < 10_000


numbers = st.one_of(st.integers(-(10**6), 10**6), st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=2))
junk = st.one_of(numbers, st.none(), st.lists(numbers, max_size=7), st.lists(st.lists(numbers, max_size=4), max_size=4))


# a busy machine is no failure
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(
            ["foreground", "background", "roi", "slice", "points", "point_labels", "label_prompt", "label"]
        ),
        junk,
    )
)
def test_any_request_gives_prompts_inside_the_volume_or_a_clear_error(request_: dict[str, Any]) -> None:
    try:
        prompt = parse(request_, SHAPE)
    except BadPromptError:
        return
    for points in (prompt.foreground, prompt.background):
        assert points.dtype == np.int64
        assert ((points >= 0) & (points < SHAPE)).all()
    assert prompt.slice is None or 0 <= prompt.slice < SHAPE[2]
    for (low, high), size in zip(prompt.box or (), SHAPE, strict=False):
        assert 0 <= low <= high < size


def test_a_segment_named_like_a_field_of_the_request_takes_nothing_from_it() -> None:
    request = {"label": "image", "image": "/srv/scans/anna.nii.gz", "roi": [1, 3, 1, 3, 0, 0]}
    assert not len(parse(request, (8, 8, 4)).foreground)
    assert not len(parse({"label": "background", "background": [[1, 1, 1]]}, (8, 8, 4)).foreground)


def test_numbers_too_large_for_a_float_are_refused() -> None:
    with pytest.raises(BadPromptError, match="finite"):
        parse({"foreground": [[10**400, 1, 1]]}, (8, 8, 4))
