"""Segmentations that name their values, as 3D Slicer writes them, decoded by name.

A ``.seg.nrrd`` says for each segment N its ``SegmentN_Name``, ``SegmentN_LabelValue`` and ``SegmentN_Layer``
(https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html). The values follow the order in
which the segments were made, not that of our labels. Segments that overlap lie in several layers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aslseg.errors import BadLabelError
from aslseg.registry import suggest
from aslseg.types import Labels

# Slicer lists these segments but they are no labels
SHOWN = 5
"""Values of voxels in an error message, at most."""
NOT_LABELS = {"background", "foreground_scribbles", "background_scribbles"}


@dataclass(frozen=True)
class Segment:
    """One segment of a segmentation.

    Attributes:
        name: As the annotator wrote it.
        value: Voxel value in its layer.
        layer: Number of its layer.
    """

    name: str
    value: int
    layer: int = 0


def segments_of(fields: Mapping[str, str], layers: int) -> list[Segment]:
    """The segments that a header names, in its order; none if it names none.

    Args:
        fields: Key/value pairs of the header.
        layers: How many layers the file holds. Slicer 4.10 and before write one layer a segment, without values.

    Raises:
        BadLabelError: A value or a layer that is no number.
    """
    numbers = sorted(int(m[1]) for m in (re.fullmatch(r"Segment(\d{1,4})_Name", key) for key in fields) if m)
    found = []
    for position, n in enumerate(numbers):
        name = fields[f"Segment{n}_Name"]
        own_layer = position if f"Segment{n}_LabelValue" not in fields and layers > 1 else 0
        try:
            value = int(fields.get(f"Segment{n}_LabelValue", "1"))
            layer = int(fields.get(f"Segment{n}_Layer", str(own_layer)))
        except ValueError:
            raise BadLabelError(f"segment {name!r}: its value or layer is no number; save it again in Slicer") from None
        found.append(Segment(name.strip(), value, layer))
    return found


def same_name(name: str) -> str:
    """The form in which two names are compared: case and Unicode form do not count."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip()


def label_value(name: str, labels: Labels) -> int:
    """The value of the label that a segment is called after.

    Raises:
        BadLabelError: No label has that name; the message names the nearest.
    """
    known = {same_name(n): value for n, value in labels.values.items()}
    found = known.get(same_name(name))
    if found is None:
        nearest = suggest(same_name(name), list(known))
        raise BadLabelError(
            f"segment {name!r} is not one of the labels {', '.join(labels.names)}; {nearest}"
            f"{'' if nearest.endswith('?') else '.'} "
            "Rename or remove the segment and try again"
        )
    return found


def decode_segments(layers: np.ndarray, segments: Sequence[Segment], labels: Labels, shown: int = SHOWN) -> np.ndarray:
    """Layers of segment values to a class map with our values.

    Where segments overlap, the label that comes later in ``labels``, as an inner one does, wins. A segment without
    voxels need not have a known name.

    Args:
        layers: (layers, i, j, k).
        segments: Names and values.
        labels: Configured labels.
        shown: At most so many values stand in an error message.

    Returns:
        uint8 class map (i, j, k).

    Raises:
        BadLabelError: A segment of unknown name, or voxels that belong to no segment.
    """
    drawn: list[tuple[int, np.ndarray]] = []
    for number, layer in enumerate(layers):
        unnamed = set(np.unique(layer).tolist()) - {0}
        for segment in (s for s in segments if s.layer == number and s.value in unnamed):
            unnamed.discard(segment.value)
            if same_name(segment.name) not in NOT_LABELS:
                drawn.append((label_value(segment.name, labels), layer == segment.value))
        if unnamed:
            names = ", ".join(repr(s.name) for s in segments)
            raise BadLabelError(
                f"{listed(unnamed, shown)} belong to none of its segments ({names}); save the segmentation again in "
                "Slicer"
            )
    out = np.zeros(layers.shape[1:], np.uint8)
    for value, mask in sorted(drawn, key=lambda pair: pair[0]):
        out[mask] = value
    return out


def listed(values: set[float] | Sequence[float], most: int = SHOWN) -> str:
    """Voxel values for a message; numbers that cannot be labels are counted, not shown, and with ``most`` 0 all are."""
    found = sorted(values)
    if not most:
        return f"values of its voxels ({len(found)} of them)"
    small = [f"{v:g}" for v in found if float(v).is_integer() and -1000 <= v <= 65535][:most]
    rest = len(found) - len(small)
    kind = "values that are no whole numbers" if any(not float(v).is_integer() for v in found) else "further values"
    parts = ([f"values [{', '.join(small)}]"] if small else []) + ([f"{rest} {kind}"] if rest else [])
    return " and ".join(parts)
