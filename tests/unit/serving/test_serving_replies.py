"""Masks keep the scan's grid, voxel for voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aslseg.serving.replies import write_mask
from aslseg.types import Labels, Volume
from aslseg.volume.io import read_label

ROTATION = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize("extension", [".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_same_grid_and_order(extension: str, flip: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (5, 6, 7), dtype=np.uint8)
    affine = np.eye(4)
    affine[:3, :3] = ROTATION @ np.diag(np.multiply(flip, (0.8, 0.9, 2.5)))
    affine[:3, 3] = -20, 33, 400
    path = write_mask(mask, affine, extension)
    try:
        read = read_label(path, Volume(np.zeros(mask.shape, np.float32), affine), Labels.parse("liver,tumour"))
        assert (read == mask).all()
    finally:
        path.unlink()


def test_ohif_can_read_the_voxels_behind_the_header() -> None:
    mask = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = write_mask(mask, np.eye(4), compress=False)
    try:
        header, _, voxels = path.read_bytes().partition(b"\n\n")
        assert b"encoding: raw" in header
        assert b"type: unsigned char" in header
        assert voxels == mask.tobytes(order="F")
    finally:
        Path(path).unlink()
