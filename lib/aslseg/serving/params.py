"""What a client may put into the ``params`` of an inference request, read and validated once.

MONAI Label lets ``params`` overwrite the image path, the model file, the tag a mask is saved under and the log
level. Here :class:`InferenceParams` lists what is allowed; dangerous names are refused, unknown ones are ignored.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO
from aslseg.serving.http_errors import RefusedError, safe_name

PROMPTS = ("foreground", "background", "roi", "slice", "points", "point_labels", "label_prompt", "label", "size")
REFUSED = frozenset(
    (
        *("image", "image_path", "label_path", "path", "model", "model_filename", "network", "bundle_path"),
        *("train_ds", "val_ds", "logging", "timeout", "session", "description", "gpus", "result_write_to_file"),
    )
)
MAX_TEXT = 2_000_000
MAX_DEPTH = 20
MAX_POINTS = 1000
MAX_NAME = 256


def parse_json(text: str | bytes) -> Any:
    """Read the JSON of a client strictly.

    Whatever this function returns can be written as JSON and read again.

    Raises:
        RefusedError: Not JSON, NaN or an infinite number (1e999), a key given twice, half of a surrogate pair, nested
            more than 20 levels deep, or longer than 2 million characters.
    """
    if len(text) > MAX_TEXT:
        raise RefusedError(f"params: {len(text)} characters; expected at most {MAX_TEXT}", 413)
    try:
        found = json.loads(text, parse_constant=_not_a_number, parse_float=_finite, object_pairs_hook=_without_repeats)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise RefusedError(f"params: nested too deeply; expected at most {MAX_DEPTH} levels") from None
    except UnicodeEncodeError:
        raise RefusedError("params: holds half of a surrogate pair, which is not valid Unicode") from None
    except ValueError as error:
        raise RefusedError(f"params: not valid JSON ({error})") from None
    if _depth(found) > MAX_DEPTH:
        raise RefusedError(f"params: nested too deeply; expected at most {MAX_DEPTH} levels")
    return found


def parse_object(text: str | bytes, what: str = "params") -> dict[str, Any]:
    """As :func:`parse_json`, for a JSON object; an empty text is an empty object.

    Raises:
        RefusedError: As :func:`parse_json`, or another kind of value.
    """
    found = parse_json(text or "{}")
    if not isinstance(found, dict):
        raise RefusedError(f"{what}: expected a JSON object, got {type(found).__name__}")
    return found


def validate_params(params: Any) -> InferenceParams:
    """The allowed part of a client's parameters for inference, with every value checked.

    Raises:
        RefusedError: A parameter that only the server may set, or an unusable value.
    """
    if not isinstance(params, dict):
        raise RefusedError(f"params: expected a JSON object, got {type(params).__name__}")
    try:
        return InferenceParams.model_validate(params)
    except ValidationError as error:
        raise _refusal(error.errors()[0]) from None


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise ValueError("expected numbers below 1e15")
    return value


def _flag(value: Any) -> Any:
    """Slicer sends the text that its table of options shows."""
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).strip().casefold())
    if found is None:
        raise ValueError("expected true or false")
    return found


MEANING = {"undo": "expected how many of the last clicks to leave out, from 0"}

Number = Annotated[int | float, BeforeValidator(_number)]
Numbers = Annotated[list[Number], Field(max_length=MAX_POINTS)]
Points = Annotated[list[Annotated[list[Number], Field(min_length=3, max_length=3)]], Field(max_length=MAX_POINTS)]
Flag = Annotated[bool, BeforeValidator(_flag)]


class InferenceParams(BaseModel):
    """The parameters of an inference request.

    Attributes:
        foreground, background: Clicked voxels [i, j, k] of the scan, inside and outside the object.
        roi: Slicer's box [i0, i1, j0, j1, k0, k1], voxels.
        slice: The slice that the annotator looks at (Slicer sends millimetres with a box).
        points, point_labels, label_prompt: MONAI's VISTA-3D prompts, which OHIF sends for class prompts.
        label: Name of the clicked segment.
        size: A smaller or larger answer to a first click.
        respect_existing: Nothing is drawn over what was submitted or promoted.
        use_ssl, whole, undo: Start from the automatic mask; answer with the whole object; leave out the last n clicks.
        result_extension, result_dtype, result_compress: The file that is wanted.
        restore_label_idx: Only OHIF sends it.
        save_label, label_tag: Whether the mask is saved in the datastore too, and under which tag.
        client_id: The name that the client gives itself; nobody checks it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    foreground: Points | None = None
    background: Points | None = None
    roi: Numbers | None = None
    slice: Number | None = None
    points: Points | None = None
    point_labels: Numbers | None = None
    label_prompt: Numbers | None = None
    label: Annotated[str, Field(max_length=128)] | None = None
    size: Annotated[str, Field(max_length=32)] | None = None
    respect_existing: Flag = True
    use_ssl: Flag | None = None
    whole: Flag = False
    undo: Annotated[int, Field(ge=0, le=MAX_POINTS)] = 0
    result_extension: Literal[".nrrd", ".nii.gz", ".nii"] = ".nrrd"
    result_dtype: Literal["uint8"] = "uint8"
    result_compress: Flag = True
    restore_label_idx: Flag | None = None
    save_label: Flag = False
    label_tag: str = ORIGINAL
    client_id: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    device: Any = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _allowed(cls, params: dict[str, Any]) -> dict[str, Any]:
        refused = sorted(k for k in params if k in REFUSED or k.startswith("_"))
        if refused:
            names = ", ".join(name[:80] for name in refused[:5])
            raise RefusedError(f"params: {names} may not be set by a client; leave it out")
        given = {k: v for k, v in params.items() if v is not None}
        label = given.get("label")
        clicked = given.get(label) if isinstance(label, str) and label not in PROMPTS else None
        if isinstance(clicked, list) and "foreground" not in given:
            # Slicer's multi-label mode sends the clicks under the segment's own name
            given["foreground"] = clicked
        return given

    @field_validator("device")
    @classmethod
    def _existing_device(cls, value: Any) -> None:
        """A client may name a device that exists; the server's own setting decides."""
        import torch

        first = value[0] if isinstance(value, list) and value else value
        known = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        known += [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        if first is not None and first not in known:
            raise RefusedError(f"device {str(first)[:40]!r}: this server has {', '.join(known)}")

    @model_validator(mode="after")
    def _tag_for_machine_masks(self) -> InferenceParams:
        if self.save_label and safe_name(self.label_tag, "label_tag").casefold() in (FINAL, PSEUDO):
            raise RefusedError(f"label_tag {self.label_tag!r} is not for machine masks; use {ORIGINAL!r}", 403)
        return self

    @property
    def prompts(self) -> dict[str, Any]:
        """The clicks, boxes and names that were given, for :func:`aslseg.prompts.from_client.parse`."""
        return self.model_dump(include=set(PROMPTS), exclude_none=True)


def _refusal(error: ErrorDetails) -> RefusedError:
    """The first thing that is wrong, in the words of a client."""
    name = str(error["loc"][0]) if error["loc"] else "params"
    if error["type"] == "too_long" and len(error["loc"]) == 1:
        limit = error["ctx"]["max_length"]
        return RefusedError(f"{name}: more than {limit} entries; save the label and go on with new clicks", 413)
    text = MEANING.get(name) or str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    text = text.replace("a valid ", "a ")
    return RefusedError(f"{name}: {text[:1].lower()}{text[1:]}, got {str(error['input'])[:80]!r}")


def _depth(value: Any) -> int:
    """Levels of lists and objects, counted without recursion."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, list | dict)]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth


def _not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
