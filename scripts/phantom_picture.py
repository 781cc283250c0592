"""Draw docs/images/phantom.png: slices of three phantom CTs with the outlines of their labels.

python scripts/phantom_picture.py [OUT.png] [SEED]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np

from aslseg.types import Volume
from aslseg.volume.phantom import LIVER, TUMOUR, make_phantom

WINDOW_HU = (-160, 240)
CASES, SLICES = 3, 4


def radiological(array: np.ndarray, volume: Volume, k: int) -> np.ndarray:
    """Axial slice as a radiologist sees it: rows run from front to back, columns from the patient's right to left."""
    canonical = nib.orientations.apply_orientation(array, nib.orientations.io_orientation(volume.affine))
    return canonical[::-1, ::-1, k].T


def draw(out: Path, seed: int) -> None:
    """Write the picture."""
    figure, axes = plt.subplots(CASES, SLICES, figsize=(2.3 * SLICES, 2 * CASES), facecolor="black")
    for case, row in enumerate(axes):
        scan, class_map = make_phantom(seed, case)
        levels = np.flatnonzero((class_map > 0).any((0, 1)))
        best = int((class_map == TUMOUR).sum((0, 1)).argmax())
        chosen = sorted({best, *(int(levels[int(f * (len(levels) - 1))]) for f in (0.2, 0.45, 0.7, 0.85))})
        chosen = sorted([best, *[k for k in chosen if k != best][: SLICES - 1]])
        for k, axis in zip(chosen, row, strict=True):
            x, y, _ = scan.spacing
            axis.imshow(
                radiological(scan.array, scan, k), cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], aspect=y / x
            )
            labels = radiological(class_map, scan, k)
            for value, colour in ((LIVER, "#4fc3f7"), (TUMOUR, "#ff7043")):
                if (labels >= value).any():
                    axis.contour(labels >= value, [0.5], colors=[colour], linewidths=0.9)
            axis.set_title(f"phantom {case}, slice {k}", color="white", fontsize=7, pad=2)
            axis.text(0.02, 0.5, "R", transform=axis.transAxes, color="yellow", fontsize=8, va="center")
            axis.text(0.93, 0.5, "L", transform=axis.transAxes, color="yellow", fontsize=8, va="center")
            axis.axis("off")
    figure.tight_layout(pad=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=85, facecolor="black", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "docs" / "images" / "phantom.png"
    draw(
        Path(sys.argv[1]) if len(sys.argv) > 1 else default,
        int(sys.argv[2]) if len(sys.argv) > 2 else 12,
    )
