"""From what a label file holds to a class map on the grid of its scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aslseg.errors import BadLabelError
from aslseg.types import Labels, Volume
from aslseg.volume.container import say_once
from aslseg.volume.label_values import class_map
from aslseg.volume.placement import onto_grid
from aslseg.volume.segments import SHOWN, Segment, decode_segments, segments_of


@dataclass(frozen=True)
class StoredLabel:
    """A label file as it was read.

    Attributes:
        layers: (layers, i, j, k) in the stored type.
        affine: Voxel index to RAS mm.
        fields: Key/value pairs of its header.
        segments: Names of its values that are known from elsewhere, as from the request that sent it.
    """

    layers: np.ndarray
    affine: np.ndarray
    fields: Mapping[str, str]
    segments: Sequence[Segment] = ()


def label_on_scan(
    name: str,
    stored: StoredLabel,
    image: Volume,
    labels: Labels,
    say: Callable[[str], None] = say_once,
    shown: int = SHOWN,
) -> np.ndarray:
    """What a label file holds, as a class map on the grid of its scan.

    Args:
        name: Of the file, for messages.
        stored, image, labels, say: As for :func:`read_label`.
        shown: At most so many values of voxels stand in an error message.

    Raises:
        BadLabelError: As :func:`read_label`.
    """
    own = segments_of(stored.fields, len(stored.layers))
    if not own and len(stored.layers) != 1:
        raise BadLabelError(f"label {name}: {len(stored.layers)} layers without names; save one label map")
    segments = own or stored.segments
    if not segments:
        placed = onto_grid(name, stored.layers[0], stored.affine, image, cropped=False)
        return np.ascontiguousarray(class_map(name, placed, labels, say, shown))
    layers = stored.layers
    if not own:
        named = Labels(tuple(s.name for s in segments), (None,) * len(segments))
        layers = class_map(name, layers[0], named, say, shown)[None]
    try:
        decoded = decode_segments(layers, segments, labels, shown)
    except BadLabelError as error:
        raise BadLabelError(f"label {name}: {error}") from None
    return np.ascontiguousarray(onto_grid(name, decoded, stored.affine, image, cropped=bool(own)))
