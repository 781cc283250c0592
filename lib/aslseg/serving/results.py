"""Masks as the clients expect them: uint8 on the scan's own grid, in the scan's voxel order."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from aslseg.serving.mask_encoding import nrrd
from aslseg.volume.io import write_label


def write_result(class_map: np.ndarray, affine: np.ndarray, extension: str = ".nrrd", compress: bool = True) -> Path:
    """Write a mask into a temporary file, which the caller removes.

    OHIF reads the voxels and ignores the header, so the array is written as it is: never resampled or turned.

    Args:
        class_map: (i, j, k) uint8.
        affine: The scan's affine (RAS mm).
        extension: ``.nrrd``, ``.nii.gz`` or ``.nii``.
        compress: gzip inside NRRD.
    """
    handle, name = tempfile.mkstemp(prefix="aslseg-", suffix=extension)
    os.close(handle)
    path = Path(name)
    if extension == ".nrrd":
        path.write_bytes(nrrd(class_map.astype(np.uint8, copy=False), affine, compress))
    else:
        write_label(path, class_map, affine)
    return path
