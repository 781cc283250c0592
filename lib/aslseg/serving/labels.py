"""Labels as annotators send them: checked against their scan and decoded by segment name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.errors import BadLabelError
from aslseg.registry import suggest
from aslseg.types import Labels, Volume
from aslseg.volume.io import read_label

# Slicer lists these segments but does not export them.
NOT_EXPORTED = {"background", "foreground_scribbles", "background_scribbles"}


def segment_names(label_info: Any) -> list[str]:
    """Names of the exported segments, in the order of their voxel values 1..N.

    The order of the list counts, not ``idx``: Slicer's idx is one too high wherever a background segment
    precedes, and its export numbers the segments by position.

    Raises:
        BadLabelError: Not a list of objects with a name.
    """
    if not label_info:
        return []
    if not isinstance(label_info, Sequence) or isinstance(label_info, str):
        raise BadLabelError("label_info: expected a list of {name, idx}; save the label again")
    names = []
    for entry in label_info:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise BadLabelError(f"label_info: expected {{name, idx}}, got {str(entry)[:80]!r}; save the label again")
        if name.strip().casefold() not in NOT_EXPORTED:
            names.append(name.strip())
    return names


def read_drawing(path: Path, image: Volume, labels: Labels) -> np.ndarray:
    """Read a label file of an annotator.

    Args:
        path: An image file on the scan's own grid, or OHIF's ``.bin``: one byte a voxel, first axis fastest, no header.
        image: The scan.
        labels: Names of the values 1..N.

    Returns:
        uint8 class map (i, j, k).

    Raises:
        BadLabelError: Unreadable, of another size or geometry than the scan, or values outside 0..N.
    """
    if path.suffix != ".bin":
        return read_label(path, image, labels)
    shape, size = image.array.shape, path.stat().st_size
    if size != image.array.size:
        raise BadLabelError(
            f"label {path.name}: {size} bytes, but its scan has {image.array.size} voxels {shape}; load the scan anew "
            "in OHIF and draw on that"
        )
    array = np.fromfile(path, np.uint8).reshape(shape, order="F")
    if array.max(initial=0) > len(labels):
        raise BadLabelError(
            f"label {path.name}: values up to {array.max()}, expected 0..{len(labels)} ({', '.join(labels.names)}); "
            "remove the other segments and save again"
        )
    return array


def decode_label(path: Path, image: Volume, label_info: Any, labels: Labels) -> np.ndarray:
    """A label file of an annotator to a class map with our values.

    Args:
        path: As :func:`read_drawing`.
        image: The scan.
        label_info: Slicer's list of segments, or nothing if the file already holds our values.
        labels: Configured labels.

    Returns:
        uint8 class map (i, j, k), values in the order of ``labels``.

    Raises:
        BadLabelError: Other geometry than the scan, values without a name, or a segment of unknown name.
    """
    names = segment_names(label_info)
    if not names:
        return read_drawing(path, image, labels)
    given = read_drawing(path, image, Labels(tuple(names), (None,) * len(names)))
    known = {name.casefold(): value for name, value in labels.values.items()}
    out = np.zeros(given.shape, np.uint8)
    for position, name in enumerate(names):
        drawn = given == position + 1
        if not drawn.any():
            continue
        if name.casefold() not in known:
            raise BadLabelError(
                f"segment {name!r} is not one of the labels {', '.join(labels.names)}; "
                f"{suggest(name, list(labels.names))} Rename or remove the segment and save again"
            )
        out[drawn] = known[name.casefold()]
    return out
