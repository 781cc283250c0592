"""Prompts from people: what 3D Slicer and OHIF send, in one form (docs/clicks.md).

Points are voxel indices (i, j, k) of the scan that the client loaded and may lie outside it. Slicer's ROI holds a pair
per axis, in either order, not cut to the volume; with a 2-D model and an ROI its ``slice`` is in millimetres. Every
key may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from aslseg.errors import BadPromptError

Range = tuple[int, int]
SizeStep = Literal["smaller", "larger", "smallest", "largest"]
SIZES = ("automatic", *get_args(SizeStep))  # as a client offers them


@dataclass(frozen=True)
class ClientPrompt:
    """Clicks and box of one request, in voxels of the volume they were parsed for.

    Attributes:
        foreground: Clicks inside the object, (n, 3) int64 voxel indices (i, j, k) of the volume, in the order sent.
        background: Clicks outside the object, alike.
        box: Inclusive ranges ((i0, i1), (j0, j1), (k0, k1)), or None.
        slice: The slice k that the annotator looks at, or None where the request does not say.
        label: Name of the segment, or None.
        size: The step to a smaller or larger answer to a first click, or None.
        notes: For the annotator: which parts were left out, and why.
    """

    foreground: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    background: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    box: tuple[Range, Range, Range] | None = None
    slice: int | None = None
    label: str | None = None
    size: SizeStep | None = None
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Neither a click nor a box."""
        return not len(self.foreground) and not len(self.background) and self.box is None


def parse(request: Mapping[str, Any], shape: tuple[int, int, int]) -> ClientPrompt:
    """The prompts of an inference request.

    Understands ``foreground``/``background`` (deepgrow), points under the segment's own name with ``label``
    (deepedit), ``points``/``point_labels``/``label_prompt`` (vista3d), ``roi`` and ``slice``.

    Args:
        request: The request's parameters.
        shape: (i, j, k) of the volume that indices refer to.

    Returns:
        The prompt; points outside the volume are left out, and ``notes`` say so.

    Raises:
        BadPromptError: A value of the wrong type or form, or a number that is not finite.
    """
    notes: list[str] = []
    label = request.get("label")
    if label is not None and not isinstance(label, str):
        raise BadPromptError(f"label: expected the name of a segment, got {_short(label)}")
    clicked = request.get("foreground")
    if clicked is None and label and isinstance(request.get(label), list) and label not in ("background", "roi"):
        clicked = request[label]
    foreground, background = (
        _numbers(clicked, "foreground", 3),
        _numbers(request.get("background"), "background", 3),
    )
    points, signs = (
        _numbers(request.get("points"), "points", 3),
        _numbers(request.get("point_labels"), "point_labels", 0),
    )
    if len(points) != len(signs):
        raise BadPromptError(f"point_labels: {len(signs)} labels for {len(points)} points; send one for each")
    if not np.isin(signs, (-1, 0, 1)).all():
        raise BadPromptError("point_labels: expected 1 (inside), 0 (outside) or -1 (ignore)")
    foreground = _inside(np.concatenate([foreground, points[signs == 1]]), shape, "foreground", notes)
    background = _inside(np.concatenate([background, points[signs == 0]]), shape, "background", notes)
    _require_label_values(request.get("label_prompt"))
    box = _box(request.get("roi"), shape, notes)
    at = _slice(request.get("slice"), foreground, background, box, shape, notes)
    return ClientPrompt(foreground, background, box, at, label, _size(request.get("size")), tuple(notes))


def _numbers(value: Any, name: str, width: int) -> np.ndarray:
    """Lists of ``width`` numbers as (n, width), or for width 0 plain numbers as (n,), float64 and finite."""
    if value is None:
        value = []
    if not isinstance(value, list | tuple | np.ndarray):
        raise BadPromptError(f"{name}: expected a list, got {_short(value)}")
    for entry in value:
        numbers = entry if width else [entry]
        if not isinstance(numbers, list | tuple | np.ndarray) or len(numbers) != (width or 1):
            raise BadPromptError(f"{name}: expected points [i, j, k] of three numbers, got {_short(entry)}")
        if not all(map(_finite, numbers)):
            raise BadPromptError(f"{name}: expected finite numbers, got {_short(entry)}")
    return np.array(value, np.float64).reshape((len(value), width) if width else (len(value),))


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and abs(value) < 1e15


def _inside(points: np.ndarray, shape: tuple[int, int, int], name: str, notes: list[str]) -> np.ndarray:
    voxels = np.rint(points).astype(np.int64)
    good = ((voxels >= 0) & (voxels < shape)).all(1)
    if not good.all():
        notes.append(f"{int((~good).sum())} {name} point(s) outside the volume {shape} were left out")
    return voxels[good]


def _box(roi: Any, shape: tuple[int, int, int], notes: list[str]) -> tuple[Range, Range, Range] | None:
    ends = _numbers(roi, "roi", 0)
    if not len(ends):
        return None
    if len(ends) != 6:
        raise BadPromptError(f"roi: expected six numbers [i0, i1, j0, j1, k0, k1], got {len(ends)}")
    low, high = np.sort(np.rint(ends).reshape(3, 2), 1).T
    if (low == high).sum() > 1:
        notes.append("the ROI has no extent and was left out; draw it around the object")
        return None
    if (high < 0).any() or (low >= shape).any():
        notes.append(f"the ROI lies outside the volume {shape} and was left out")
        return None
    last = np.array(shape) - 1
    cut = np.stack([low.clip(0, last), high.clip(0, last)], 1).astype(int)
    if (cut[:, 0] != low).any() or (cut[:, 1] != high).any():
        notes.append(f"the ROI was cut to the volume {shape}")
    (i0, i1), (j0, j1), (k0, k1) = cut.tolist()
    return (i0, i1), (j0, j1), (k0, k1)


def _slice(
    value: Any,
    foreground: np.ndarray,
    background: np.ndarray,
    box: tuple[Range, Range, Range] | None,
    shape: tuple[int, int, int],
    notes: list[str],
) -> int | None:
    """The slice k: the given one, else that of a click, else the middle of the box (for a value in millimetres)."""
    if value is not None and not _finite(value):
        raise BadPromptError(f"slice: expected a number, got {_short(value)}")
    clicked = foreground[:, 2] if len(foreground) else background[:, 2]
    asked = None if value is None else round(value)
    if len(clicked):
        return asked if asked in clicked else int(clicked[-1])
    low, high = box[2] if box else (0, shape[2] - 1)
    if asked is not None and low <= asked <= high:
        return asked
    if box:
        return (low + high) // 2
    if asked is not None:
        notes.append(f"slice {asked} lies outside the volume {shape}; the nearest one was taken")
        return min(max(asked, low), high)
    return None


def _size(value: Any) -> SizeStep | None:
    if value is None or value == SIZES[0]:
        return None
    if value not in SIZES:
        raise BadPromptError(f"size: expected {', '.join(SIZES)}, got {_short(value)}")
    found: SizeStep = value
    return found


def _require_label_values(value: Any) -> None:
    numbers = _numbers(value, "label_prompt", 0)
    if (numbers != np.rint(numbers)).any() or (numbers < 0).any():
        raise BadPromptError(f"label_prompt: expected label values from 0, got {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
