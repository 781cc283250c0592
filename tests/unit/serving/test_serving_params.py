"""What clients may say: the dangerous is refused, the unknown dropped, the rest checked."""

from __future__ import annotations

from typing import Any

import pytest

from aslseg.serving.http_errors import RefusedError
from aslseg.serving.params import parse, validate_params


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"image": "/etc/passwd"}, "image may not be set"),
        ({"model_filename": "x.pt"}, "model_filename"),
        ({"logging": "DEBUG"}, "logging"),
        ({"timeout": 1e9}, "timeout"),
        ({"_image_id": "x"}, "_image_id"),
        ({"device": "cuda:99"}, "this server has"),
        ({"result_extension": ".sh"}, "expected one of"),
        ({"result_dtype": "float64"}, "uint8"),
        ({"save_label": True, "label_tag": "final"}, "not for machine masks"),
        ({"save_label": True, "label_tag": "aslseg_pseudo"}, "not for machine masks"),
        ({"save_label": True, "label_tag": "../x"}, "not allowed"),
        ({"foreground": "1,2,3"}, "expected a list"),
        ({"foreground": [["1", "2", "3"]]}, "expected numbers"),
        ({"foreground": [[0, 0, 0]] * 20_000}, "at most"),
        ({"roi": {"x": 1}}, "expected a list"),
        ({"slice": "five"}, "expected a number"),
        ({"label": ["liver"]}, "name of a segment"),
        ([], "JSON object"),
    ],
)
def test_refused(params: Any, match: str) -> None:
    with pytest.raises(RefusedError, match=match):
        validate_params(params)


@pytest.mark.parametrize("text", ["{", "NaN", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a": Infinity}'])
def test_json_is_read_strictly(text: str) -> None:
    with pytest.raises(RefusedError):
        parse(text)


def test_what_slicer_and_ohif_send_passes() -> None:
    slicer = {"label": "liver", "foreground": [[3, -4, 900]], "background": [], "result_extension": ".nrrd"}
    slicer |= {
        "result_dtype": "uint8",
        "result_compress": True,
        "client_id": "user-xyz",
        "restore_label_idx": False,
    }
    assert validate_params({**slicer, "liver": [[1, 2, 3]], "sw_overlap": 0.3}) == slicer
    assert parse('{"roi": [5, 1, 2, 9, 0, 3]}') == {"roi": [5, 1, 2, 9, 0, 3]}


@pytest.mark.parametrize("label", ["roi", "points"])
def test_a_segment_that_is_called_like_a_parameter_has_no_clicks_under_its_name(label: str) -> None:
    values = {"roi": [5, 1, 2, 9, 0, 3], "points": [[1, 2, 3]]}
    assert validate_params({"label": label, **values}) == {"label": label, **values}
