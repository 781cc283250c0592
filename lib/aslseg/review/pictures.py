"""Outlines of a mask on one slice of its scan, as PNG."""

from __future__ import annotations

import io
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from aslseg.settings import Settings
from aslseg.types import Volume
from aslseg.volume.intensity import normalise

COLOURS = ("#4fc3f7", "#ff7043", "#aed581", "#ba68c8", "#ffd54f", "#f06292")
"""Of the labels in their order; they repeat after the last."""
INCHES, DOTS_PER_INCH = 3.6, 100


@dataclass(frozen=True)
class Picture:
    """An axial slice with outlines.

    Attributes:
        png: The picture, as radiologists look at slices: the patient's right is on the left, the front on top.
        slice: Number of the slice from the feet, from 1.
        slices: How many there are.
    """

    png: bytes
    slice: int
    slices: int


def outlined(scan: Volume, class_map: np.ndarray, settings: Settings, label: str | None = None) -> Picture | None:
    """Draw the slice on which a label is largest, with the outlines of all labels.

    Args:
        scan: In its own grid.
        class_map: (i, j, k), values 0..N, on the same grid.
        settings: Labels, and the window of intensities.
        label: The slice is chosen by this label with all that is nested in it. None, and a label that the mask does
            not hold, stand for all of them together.

    Returns:
        None where the mask is empty.

    Raises:
        ValueError: The mask is on another grid than the scan.
    """
    if class_map.shape != scan.array.shape:
        raise ValueError(f"the mask has the shape {class_map.shape}, its scan {scan.array.shape}")
    labels, orientation = settings.label_set, nib.orientations.io_orientation(scan.affine)
    grey, mask = (
        nib.orientations.apply_orientation(array, orientation) for array in (normalise(scan.array, settings), class_map)
    )
    areas = [np.isin(mask, labels.members(labels.names.index(label))).sum((0, 1))] if label in labels.names else []
    areas = [*(a for a in areas if a.any()), (mask > 0).sum((0, 1))]
    if not areas[0].any():
        return None
    k = int(areas[0].argmax())
    x, y, _ = np.asarray(scan.spacing)[np.argsort(orientation[:, 0])]
    # (i, j) of RAS axes to rows from front to back and columns from the patient's right to left
    grey, mask = (np.ascontiguousarray(array[::-1, ::-1, k].T) for array in (grey, mask))
    regions = [np.isin(mask, labels.members(n)) for n in range(len(labels))]
    return Picture(_png(grey, regions, y / x), k + 1, len(areas[0]))


def _png(grey: np.ndarray, regions: list[np.ndarray], aspect: float) -> bytes:
    """Draw a slice (rows, columns) with values in 0..1, and outlines of masks of the same shape."""
    # takes long to import; without pyplot, which keeps figures and is not made for several threads
    from matplotlib.figure import Figure

    height, width = grey.shape[0] * aspect, grey.shape[1]
    scale = INCHES / max(height, width)
    figure = Figure(figsize=(width * scale, height * scale), dpi=DOTS_PER_INCH, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="bilinear")
    for n, region in enumerate(regions):
        if region.any():
            # a frame of background, so that a mask that reaches the border is closed there
            framed = np.pad(region, 1)
            rows, columns = (np.arange(size) - 1 for size in framed.shape)
            axes.contour(columns, rows, framed, [0.5], colors=[COLOURS[n % len(COLOURS)]], linewidths=1.2)
    axes.set_xlim(-0.5, grey.shape[1] - 0.5)
    axes.set_ylim(grey.shape[0] - 0.5, -0.5)
    for place, text in ((0.02, "R"), (0.95, "L")):
        axes.text(place, 0.5, text, transform=axes.transAxes, color="yellow", fontsize=9, va="center")
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="black", metadata={"Software": None})
    return out.getvalue()
