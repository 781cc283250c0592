"""Parameters of clients: dangerous ones are refused, unknown ones ignored, all others validated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aslseg.serving.http_errors import RefusedError
from aslseg.serving.params import MAX_POINTS, parse_json, parse_object, validate_params


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"image": "/etc/passwd"}, "image may not be set"),
        ({"model_filename": "x.pt"}, "model_filename"),
        ({"logging": "DEBUG"}, "logging"),
        ({"timeout": 1e9}, "timeout"),
        ({"_image_id": "x"}, "_image_id"),
        ({"device": "cuda:99"}, "this server has"),
        ({"device": [["x"]]}, "this server has"),
        ({"device": {"a": 1}}, "this server has"),
        ({"client_id": [[1]]}, "client_id: expected a string"),
        ({"client_id": "x" * 300}, "client_id"),
        ({"result_extension": ".sh"}, "expected '.nrrd'"),
        ({"result_dtype": "float64"}, "uint8"),
        ({"result_compress": "maybe"}, "true or false"),
        ({"save_label": True, "label_tag": "final"}, "not for machine masks"),
        ({"save_label": True, "label_tag": "Final"}, "not for machine masks"),
        ({"save_label": True, "label_tag": "aslseg_pseudo"}, "not for machine masks"),
        ({"save_label": True, "label_tag": "../x"}, "not allowed"),
        ({"foreground": "1,2,3"}, "foreground: expected a list"),
        ({"foreground": [["1", "2", "3"]]}, "expected numbers"),
        ({"foreground": [[1, 2]]}, "at least 3 items"),
        ({"foreground": [[True, 2, 3]]}, "expected numbers"),
        ({"foreground": [[0, 0, 0]] * (MAX_POINTS + 1)}, "more than"),
        ({"roi": {"x": 1}}, "expected a list"),
        ({"slice": "five"}, "slice: expected numbers"),
        ({"slice": 1e15}, "slice: expected numbers"),
        ({"undo": -1}, "undo"),
        ({"label": ["liver"]}, "label: expected a string"),
        ({"use_ssl": [1]}, "true or false"),
        ([], "JSON object"),
    ],
)
def test_refused(params: Any, match: str) -> None:
    with pytest.raises(RefusedError, match=match):
        validate_params(params)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "NaN",
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"x":' * 250 + "1" + "}" * 250,
        "[" * 21 + "]" * 21,
        '{"a": Infinity}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_json_that_cannot_be_stored_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        parse_json(text)


@pytest.mark.parametrize("text", ["[" * 20 + "]" * 20, '{"a": "\\ud83d\\ude42", "b": [1, -2.5e300, null, true]}'])
def test_other_json_can_be_written_and_read_again(text: str) -> None:
    assert json.loads(json.dumps(parse_json(text))) == json.loads(text)


def test_an_object_is_expected_where_info_is_stored() -> None:
    assert parse_object("") == {}
    with pytest.raises(RefusedError, match="info: expected a JSON object, got list"):
        parse_object("[]", "info")


def test_what_slicer_and_ohif_send_passes() -> None:
    slicer = {"label": "liver", "foreground": [[3, -4, 900]], "background": [], "result_extension": ".nrrd"}
    slicer |= {"result_dtype": "uint8", "result_compress": True, "client_id": "user-xyz", "restore_label_idx": False}
    found = validate_params({**slicer, "liver": [[1, 2, 3]], "sw_overlap": 0.3, "undo": None, "use_ssl": "True"})
    assert found.model_dump(exclude_unset=True) == slicer | {"use_ssl": True}
    assert found.prompts == {"label": "liver", "foreground": [[3, -4, 900]], "background": []}
    assert validate_params(parse_json('{"roi": [5, 1, 2, 9, 0, 3.5]}')).roi == [5, 1, 2, 9, 0, 3.5]


def test_points_under_the_name_of_the_segment_are_clicks() -> None:
    assert validate_params({"label": "liver", "liver": [[1, 2, 3]]}).foreground == [[1, 2, 3]]


@pytest.mark.parametrize("label", ["roi", "points"])
def test_a_segment_that_is_called_like_a_parameter_has_no_clicks_under_its_name(label: str) -> None:
    values = {"roi": [5, 1, 2, 9, 0, 3], "points": [[1, 2, 3]]}
    found = validate_params({"label": label, **values})
    assert found.foreground is None
    assert found.prompts == {"label": label, **values}
