"""Two rounds on the left-atrium MR scans of ../shared/data/la at half resolution, scored on held-out scans.

8 labelled (the first 8 of train.txt), 40 unlabelled, the last 16 held out. The truth of the unlabelled and held-out
scans lies outside the studies folder and is read for scoring only. About 50 minutes on two CPU cores:

    python benchmarks/realdata_la.py --out work/la
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from aslseg.types import Volume
from aslseg.volume.io import read_image, write_image, write_label
from realdata import Experiment, arguments_of, run_experiment

LABELLED, UNLABELLED, HELD_OUT = 8, 40, 16
CONF = {"labels": "atrium", "modality": "mr", "spacing": "native", "promote_threshold": "0.85"}


def averaged(array: np.ndarray, edge: int) -> np.ndarray:
    """Means of cubes of ``edge`` voxels of (i, j, k); what is left at the end of an axis is dropped."""
    i, j, k = (n // edge for n in array.shape)
    whole = array[: edge * i, : edge * j, : edge * k]
    return whole.reshape(i, edge, j, edge, k, edge).mean((1, 3, 5))


def half(array: np.ndarray) -> np.ndarray:
    """2 x 2 x 2 mean of (i, j, k); an odd last plane is dropped."""
    return averaged(array, 2)


def averaged_affine(affine: np.ndarray, edge: int) -> np.ndarray:
    """Affine of the grid of :func:`averaged`: a new voxel's centre is the middle of its cube."""
    return affine @ nib.affines.from_matvec(np.diag([float(edge)] * 3), [(edge - 1) / 2] * 3)


def half_affine(affine: np.ndarray) -> np.ndarray:
    """Affine of the halved grid."""
    return averaged_affine(affine, 2)


def build(data: Path, out: Path) -> None:
    """Studies folder, held-out scans and the truths under ``out``."""
    names = [n for n in (data / "train.txt").read_text().split() if n]
    chosen = [*names[: LABELLED + UNLABELLED], *names[-HELD_OUT:]]
    for n, name in enumerate(chosen):
        image = read_image(data / "images" / f"{name}.nii.gz")
        mask = read_image(data / "labels" / f"{name}.nii.gz")
        affine = half_affine(image.affine)
        label = (half(mask.array) >= 0.5).astype(np.uint8)
        scans = out / "studies" if n < LABELLED + UNLABELLED else out / "heldout"
        truth = out / "studies" / "labels" / "final" if n < LABELLED else out / "truth"
        write_image(scans / f"{name}.nii.gz", Volume(half(image.array), affine))
        write_label(truth / f"{name}.nii.gz", label, affine)


def main() -> None:
    arguments = arguments_of(__doc__, "la")
    conf = CONF | dict(pair.split("=", 1) for pair in arguments.conf)
    experiment = Experiment("la", "Left atrium, MR, half resolution", arguments.out, conf, arguments.rounds)
    if not (arguments.out / "heldout").exists():
        build(arguments.data, arguments.out)
    run_experiment(experiment)


if __name__ == "__main__":
    main()
