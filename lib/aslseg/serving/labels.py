"""Labels as annotators send them: read as untrusted files, checked against their scan, decoded by segment name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.errors import BadLabelError
from aslseg.types import Labels, Volume
from aslseg.volume.label_file import StoredLabel, label_on_scan
from aslseg.volume.segments import NOT_LABELS, Segment, same_name, segments_of
from aslseg.volume.untrusted import Limits, read_untrusted_label

RAW = ".bin"
MOST_SEGMENTS = 255  # values of a voxel of one byte


def segment_names(label_info: Any) -> list[str]:
    """Names of the exported segments, in the order of their voxel values 1..N.

    The order of the list counts, not ``idx``: Slicer's idx is one too high wherever a background segment
    precedes, and its export numbers the segments by position.

    Raises:
        BadLabelError: Not a list of objects with a name, or more of them than a byte has values.
    """
    if not label_info:
        return []
    if not isinstance(label_info, Sequence) or isinstance(label_info, str):
        raise BadLabelError("label_info: expected a list of {name, idx}; save the label again")
    if len(label_info) > MOST_SEGMENTS:
        raise BadLabelError(f"label_info: {len(label_info)} segments; expected at most {MOST_SEGMENTS}. Remove some")
    names = []
    for entry in label_info:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise BadLabelError(f"label_info: expected {{name, idx}}, got {str(entry)[:80]!r}; save the label again")
        if same_name(name) not in NOT_LABELS:
            names.append(name.strip())
    return names


def decode_label(
    path: Path, image: Volume, label_info: Any, labels: Labels, most_voxels: float = math.inf
) -> np.ndarray:
    """A label file of an annotator to a class map with our values.

    Args:
        path: Label file at the place of the scan, or OHIF's ``.bin``: one byte a voxel, first axis fastest, no header.
        image: The scan.
        label_info: Slicer's list of segments, or nothing if the file already holds our values. A file that names its
            values itself (``.seg.nrrd``) is decoded by those names.
        labels: Configured labels.
        most_voxels: More in the file, over all its layers, are refused; a label of one layer may always have as many as
            its scan.

    Returns:
        uint8 class map (i, j, k), values in the order of ``labels``.

    Raises:
        BadLabelError: Other geometry than the scan, values without a name, or a segment of unknown name.
    """
    names = segment_names(label_info)
    # Slicer writes at most one layer a segment, each no larger than the scan; how many it says is the client's word
    most = image.array.size * max(1, len({same_name(name) for name in names}), len(labels))
    capped = max(image.array.size, min(most, most_voxels))
    limits = Limits(capped, setting="the voxels of its scan" if capped == most else "max_upload_voxels")
    stored = _raw_label(path, image) if path.suffix == RAW else read_untrusted_label(path, limits)
    if names and not segments_of(stored.fields, len(stored.layers)):
        segments = [Segment(name, position + 1) for position, name in enumerate(names)]
        stored = StoredLabel(stored.layers, stored.affine, stored.fields, segments)
    # answers never repeat what a file holds: should a reader ever be led to another file, its bytes stay here
    return label_on_scan(path.name, stored, image, labels, shown=0)


def _raw_label(path: Path, image: Volume) -> StoredLabel:
    """The voxels of OHIF, which are in the order of the scan's own."""
    shape, size = image.array.shape, path.stat().st_size
    if size != image.array.size:
        raise BadLabelError(
            f"label {path.name}: {size} bytes, but its scan has {image.array.size} voxels {shape}; load the scan anew "
            "in OHIF and draw on that"
        )
    return StoredLabel(np.fromfile(path, np.uint8).reshape(shape, order="F")[None], image.affine, {})
