"""Labels brought onto the grid of their scan: by turning axes and by placing a cropped box, never by interpolation."""

from __future__ import annotations

import numpy as np

from aslseg.errors import BadLabelError
from aslseg.types import Volume

AFFINE_TOLERANCE_MM = 0.05


def tolerance(image: Volume) -> float:
    """How far in mm a label may lie off its scan, for headers that were rounded."""
    return max(AFFINE_TOLERANCE_MM, 0.1 * min(image.spacing))


def distance(shape: tuple[int, ...], a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance in mm, along an axis, between the corners of one grid under two affines."""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*shape, 1]
    return float(np.abs(corners @ (a - b).T)[:, :3].max())


def onto_grid(name: str, array: np.ndarray, affine: np.ndarray, image: Volume, cropped: bool) -> np.ndarray:
    """A label on the grid of its scan.

    Args:
        name: Of the label's file, for messages.
        array: (i, j, k) in any order and direction of axes.
        affine: Voxel index of ``array`` to RAS mm.
        image: The scan.
        cropped: Whether the label may cover a part of the scan, or reach beyond it where it is empty.

    Returns:
        Array of the scan's shape; a view where that is possible.

    Raises:
        BadLabelError: Another place, voxel size or angle than the scan, or another size unless ``cropped``.
    """
    to_scan = np.linalg.solve(image.affine, affine)
    axes = np.abs(to_scan[:3, :3]).argmax(0)  # for each axis of the label, that of the scan
    turned, start, mapped = array, np.zeros(3, int), np.eye(4)
    if sorted(axes) == [0, 1, 2]:
        flipped = to_scan[axes, range(3)] < 0
        turned = array[tuple(slice(None, None, -1 if f else 1) for f in flipped)].transpose(np.argsort(axes))
        mapped = affine @ _index_of_turned(array.shape, axes, flipped)
        if cropped:
            start = np.rint(np.linalg.solve(image.affine, mapped)[:3, 3]).astype(int)
    if turned.shape != image.array.shape and not cropped:
        raise BadLabelError(
            f"label {name}: shape {array.shape}, but its scan has {image.array.shape}; "
            "draw the label on the scan itself or resample it to the scan's grid"
        )
    shifted = image.affine.copy()
    shifted[:3, 3] += image.affine[:3, :3] @ start
    off = distance(turned.shape, mapped, shifted)
    if not off <= tolerance(image):
        raise BadLabelError(
            f"label {name}: its affine places it up to {off:.1f} mm away from its scan; "
            "save it with the scan's geometry"
        )
    if turned.shape == image.array.shape and not start.any():
        return turned
    return _pasted(name, turned, start, image.array.shape)


def _index_of_turned(shape: tuple[int, ...], axes: np.ndarray, flipped: np.ndarray) -> np.ndarray:
    """4 x 4: voxel index of the turned array to that of the array as it was."""
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for own, scan in enumerate(axes):
        back[own, scan] = -1 if flipped[own] else 1
        back[own, 3] = shape[own] - 1 if flipped[own] else 0
    return back


def _pasted(name: str, box: np.ndarray, start: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A box put into an empty array at ``start``."""
    low = np.maximum(start, 0)
    high = np.minimum(start + box.shape, shape)
    if (high <= low).any():
        inside = box[:0]
        target = np.zeros(shape, box.dtype)
    else:
        inside = box[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))]
        target = np.zeros(shape, box.dtype)
        target[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = inside
    lost = int(np.count_nonzero(box)) - int(np.count_nonzero(inside))
    if lost:
        raise BadLabelError(f"label {name}: {lost} drawn voxels lie outside its scan; draw inside the scan only")
    return target
