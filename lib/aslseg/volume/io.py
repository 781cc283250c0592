"""Reading scans and labels with every claim of the header checked; writing atomically."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from aslseg.errors import BadImageError, BadLabelError, DiskFullError
from aslseg.files import atomic_file
from aslseg.types import Labels, Volume
from aslseg.volume.container import (
    IMAGE_EXTENSIONS,
    case_id,
    extension,
    open_volume,
    require_one_channel,
    require_size,
    say_once,
)
from aslseg.volume.label_file import StoredLabel, label_on_scan
from aslseg.volume.stored import LPS_TO_RAS

__all__ = [
    "IMAGE_EXTENSIONS",
    "LPS_TO_RAS",
    "case_id",
    "extension",
    "finite_image",
    "read_header",
    "read_image",
    "read_label",
    "require_free_disk",
    "write_image",
    "write_label",
    "write_label_into",
]


def read_image(path: Path, max_voxels: float = 1.6e9) -> Volume:
    """Read a scan.

    Args:
        path: NIfTI, NRRD or MetaImage file of one 3-D volume.
        max_voxels: A larger size in the header is refused before anything is allocated.

    Returns:
        float32 array (i, j, k) and RAS affine. A trailing axis of length one is dropped.

    Raises:
        BadImageError: Unreadable, truncated, not 3-D, too large, NaN or infinite voxels, or impossible geometry.
    """
    with open_volume(path) as stored:
        require_one_channel(path.name, stored, BadImageError)
        require_size(path.name, stored, max_voxels, BadImageError, "max_voxels")
        array = stored.voxels()[0].astype(np.float32, copy=False)
    return finite_image(path.name, array, stored.affine, stored.notes)


def finite_image(name: str, array: np.ndarray, affine: np.ndarray, notes: tuple[str, ...]) -> Volume:
    """A scan of finite intensities, with what is unusual about its header logged once.

    Raises:
        BadImageError: NaN or infinite voxels.
    """
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise BadImageError(
            f"{name}: {count} voxels are NaN or infinite; expected finite intensities. "
            "Export the scan again or replace those voxels"
        )
    for note in notes:
        say_once(f"{name}: {note}")
    return Volume(array, affine, notes)


def read_header(path: Path, max_voxels: float = math.inf) -> Volume:
    """Shape, affine and notes of a scan; its voxels stay on disk and all read as 0.

    Raises:
        BadImageError: As :func:`read_image`, for what the header shows.
    """
    with open_volume(path) as stored:
        require_one_channel(path.name, stored, BadImageError)
        require_size(path.name, stored, max_voxels, BadImageError, "max_voxels")
        return Volume(np.broadcast_to(np.float32(0), stored.spatial_shape), stored.affine, stored.notes)


def read_label(
    path: Path,
    image: Volume,
    labels: Labels,
    max_voxels: float = 1.6e9,
    say: Callable[[str], None] = say_once,
) -> np.ndarray:
    """Read the label of a scan.

    Args:
        path: Label file at the place of the scan, its axes in any order. A segmentation that names its values
            (``.seg.nrrd``) is decoded by name, and may be cropped or have layers.
        image: The scan it belongs to.
        labels: Configured labels.
        max_voxels: A larger size in the header is refused.
        say: Called with a sentence where a value is read as another.

    Returns:
        uint8 class map (i, j, k) with the values 0..N.

    Raises:
        BadLabelError: Unreadable, other place or voxel size than the scan, values outside 0..N, unknown segments.
    """
    with open_volume(path, BadLabelError) as stored:
        require_size(path.name, stored, max_voxels, BadLabelError, "max_voxels")
        layers = stored.voxels()
    return label_on_scan(path.name, StoredLabel(layers, stored.affine, stored.fields), image, labels, say)


def write_label(path: Path, class_map: np.ndarray, affine: np.ndarray) -> None:
    """Write a uint8 class map (i, j, k) as NIfTI, atomically.

    Raises:
        DiskFullError, FileWriteError: The previous file, if any, is untouched.
    """
    with atomic_file(path) as temporary:
        write_label_into(temporary, class_map, affine)


def write_label_into(path: Path, class_map: np.ndarray, affine: np.ndarray) -> None:
    """As :func:`write_label`, into the temporary file of a caller who does more before it gets its name."""
    image = nib.Nifti1Image(np.asarray(class_map, np.uint8), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def write_image(path: Path, volume: Volume, dtype: type = np.int16) -> None:
    """Write a scan as NIfTI, atomically; rounded to ``dtype``."""
    array = np.rint(volume.array) if np.issubdtype(dtype, np.integer) else volume.array
    image = nib.Nifti1Image(array.astype(dtype), volume.affine)
    image.header.set_xyzt_units("mm")
    with atomic_file(path) as temporary:
        nib.save(image, temporary)


def require_free_disk(folder: Path, gigabytes: float) -> None:
    """Refuse to start a step that the disk cannot hold.

    Raises:
        DiskFullError: Less than ``gigabytes`` free on the folder's disk.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        raise DiskFullError(
            f"{folder}: {free:.2f} GB free, at least {gigabytes:.2f} GB needed (min_free_gb); nothing was written. "
            "Free some space and run again"
        )
