"""Voxel values of a label that names none: taken as they are, mapped where only one reading is possible, or refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aslseg.errors import BadLabelError
from aslseg.types import Labels
from aslseg.volume.segments import SHOWN, listed

# a label scaled by 255/256 in its header is 0.9961 for 1; further off it was interpolated
ROUNDING = 0.02
EIGHT_BIT = 255


def class_map(
    name: str, array: np.ndarray, labels: Labels, say: Callable[[str], None], shown: int = SHOWN
) -> np.ndarray:
    """Stored values to 0..N.

    Args:
        name: Of the label's file, for messages.
        array: (i, j, k) of any real type.
        labels: Configured labels.
        say: Called with a sentence where a value is read as another.
        shown: At most so many values stand in an error message.

    Returns:
        uint8 class map (i, j, k).

    Raises:
        BadLabelError: Values that are not among 0..N and have no single reading.
    """
    values = np.unique(array)
    if not np.isfinite(values).all():
        raise BadLabelError(f"label {name}: voxels that are NaN or infinite; expected 0..{len(labels)}. Save it again")
    nearest = np.rint(values.astype(np.float64))
    if np.abs(values - nearest).max(initial=0) > ROUNDING:
        raise _refused(
            name, values, labels, shown, "; values between them come from interpolation: resample by nearest voxel"
        )
    meant = nearest
    if len(labels) == 1 and set(nearest.tolist()) <= {0, EIGHT_BIT}:
        meant = nearest / EIGHT_BIT
    if not set(meant.tolist()) <= set(range(len(labels) + 1)):
        raise _refused(name, nearest, labels, shown)
    if (meant != values).any():
        pairs = [f"{v:.5g} as {m:g}" for v, m in zip(values, meant, strict=True) if v != m]
        say(f"label {name}: {', '.join(pairs)} ({', '.join(labels.names)})")
    table = meant.astype(np.uint8)
    return table[np.searchsorted(values, array)]


def _refused(name: str, values: np.ndarray, labels: Labels, shown: int, why: str = "") -> BadLabelError:
    wrong = [float(v) for v in values if v not in range(len(labels) + 1)]
    wanted = ", ".join(f"{value} = {label}" for label, value in labels.values.items())
    return BadLabelError(
        f"label {name}: {listed(wrong, shown)} are not among 0..{len(labels)} ({', '.join(labels.names)}){why}; "
        f"set `labels` to what the file holds, or write it with 0 = background, {wanted}"
    )
