"""What a client may say in the ``params`` of a request, and nothing else.

MONAI Label lets ``params`` overwrite the image path, the model file, the tag a mask is saved under and the log
level. Here a request is built from an allow-list; what is dangerous is refused, what is merely unknown is dropped.
"""

from __future__ import annotations

import json
from typing import Any

from aslseg.cases.studies import FINAL, PSEUDO
from aslseg.serving.http_errors import RefusedError, safe_name

PROMPTS = (
    "foreground",
    "background",
    "roi",
    "slice",
    "points",
    "point_labels",
    "label_prompt",
    "label",
    "reset_state",
)
RESULT = ("result_extension", "result_dtype", "result_compress", "restore_label_idx")
MAX_NAME = 256
OTHER = ("client_id", "save_label", "label_tag", "label_info", "device")
CLICKS = ("use_ssl", "whole", "undo")
REFUSED = frozenset(
    (
        *("image", "image_path", "label_path", "path", "model", "model_filename", "network", "bundle_path"),
        *(
            "train_ds",
            "val_ds",
            "logging",
            "timeout",
            "session",
            "description",
            "gpus",
            "result_write_to_file",
        ),
    )
)
EXTENSIONS = (".nrrd", ".nii.gz", ".nii")
MAX_TEXT = 2_000_000
MAX_POINTS = 10_000


def parse(text: str) -> Any:
    """JSON of a client, strictly: no NaN, no repeated keys, bounded size and depth.

    Raises:
        RefusedError: Anything else.
    """
    if len(text) > MAX_TEXT:
        raise RefusedError(f"params: {len(text)} characters, at most {MAX_TEXT} are read", 413)
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except RecursionError:
        raise RefusedError("params: nested too deeply") from None
    except ValueError as error:
        raise RefusedError(f"params: not valid JSON ({error})") from None


def validate_params(params: Any) -> dict[str, Any]:
    """The allowed part of a client's parameters for inference, with every value checked.

    Raises:
        RefusedError: A parameter that only the server may set, or an unusable value.
    """
    if not isinstance(params, dict):
        raise RefusedError(f"params: expected a JSON object, got {type(params).__name__}")
    refused = sorted(k for k in params if k in REFUSED or k.startswith("_"))
    if refused:
        raise RefusedError(f"params: {', '.join(refused)} may not be set by a client; leave it out")
    wanted = {k: params[k] for k in (*PROMPTS, *RESULT, *OTHER, *CLICKS) if params.get(k) is not None}
    label = wanted.get("label")
    named = isinstance(label, str) and label not in PROMPTS and isinstance(params.get(label), list)
    if named and "foreground" not in wanted:
        # Slicer's multi-label mode sends the clicks under the segment's own name
        wanted["foreground"] = params[label]
    _check_prompts(wanted)
    extension = wanted.get("result_extension", ".nrrd")
    if extension not in EXTENSIONS:
        raise RefusedError(f"result_extension {str(extension)[:40]!r}: expected one of {', '.join(EXTENSIONS)}")
    if wanted.get("result_dtype", "uint8") != "uint8":
        raise RefusedError(f"result_dtype {str(wanted['result_dtype'])[:40]!r}: masks are uint8")
    if wanted.get("save_label"):
        tag = safe_name(wanted.get("label_tag", "original"), "label_tag")
        if tag in (FINAL, PSEUDO):
            raise RefusedError(f"label_tag {tag!r} is not for machine masks; use 'original'", 403)
    for key in wanted.keys() & {"use_ssl", "whole"}:
        wanted[key] = _flag(key, wanted[key])
    if "undo" in wanted and not (isinstance(wanted["undo"], int) and 0 <= wanted["undo"] <= MAX_POINTS):
        raise RefusedError(f"undo: expected how many of the last clicks to leave out, got {str(wanted['undo'])[:80]!r}")
    if len(str(wanted.get("client_id", ""))) > MAX_NAME:
        raise RefusedError(f"client_id: expected at most {MAX_NAME} characters")
    if "device" in wanted:
        _check_device(wanted.pop("device"))
    return wanted


def _check_prompts(wanted: dict[str, Any]) -> None:
    label = wanted.get("label")
    if label is not None and (not isinstance(label, str) or len(label) > 128):
        raise RefusedError("label: expected the name of a segment")
    for key in ("foreground", "background", "points", "point_labels", "roi", "label_prompt"):
        values = wanted.get(key)
        if values is None:
            continue
        if not isinstance(values, list):
            raise RefusedError(f"{key}: expected a list, got {type(values).__name__}")
        if len(values) > MAX_POINTS:
            raise RefusedError(f"{key}: {len(values)} entries, at most {MAX_POINTS} are read", 413)
        for entry in values:
            numbers = entry if isinstance(entry, list) else [entry]
            if not all(_is_number(n) for n in numbers):
                raise RefusedError(f"{key}: expected numbers, got {str(entry)[:80]!r}")
    if "slice" in wanted and not _is_number(wanted["slice"]):
        raise RefusedError(f"slice: expected a number, got {str(wanted['slice'])[:80]!r}")


def _flag(key: str, value: Any) -> bool:
    """Slicer sends what its table shows, which may be text."""
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).strip().casefold())
    if found is None:
        raise RefusedError(f"{key}: expected true or false, got {str(value)[:80]!r}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _check_device(value: Any) -> None:
    """The server's own setting decides; a client may only name a device that exists."""
    import torch

    first = value[0] if isinstance(value, list) and value else value
    known = {"auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    known |= {f"cuda:{n}" for n in range(torch.cuda.device_count())}
    if first not in known:
        raise RefusedError(f"device {str(first)[:40]!r}: this server has {', '.join(sorted(known))}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
