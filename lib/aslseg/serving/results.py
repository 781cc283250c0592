"""Masks as the clients expect them: uint8 on the scan's own grid, in the scan's voxel order."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

from aslseg.volume.io import LPS_TO_RAS, write_label


def write_result(class_map: np.ndarray, affine: np.ndarray, extension: str = ".nrrd", compress: bool = True) -> Path:
    """Write a mask into a temporary file; whoever takes it removes it.

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
    if extension != ".nrrd":
        write_label(path, class_map, affine)
        return path
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(class_map.astype(np.uint8, copy=False).transpose(2, 1, 0)))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path
