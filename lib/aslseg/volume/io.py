"""Reading scans and labels with every claim of the header checked; writing atomically.

NIfTI goes through nibabel; NRRD, MetaImage and the rest through SimpleITK, turned from LPS to RAS.
"""

from __future__ import annotations

import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from aslseg.errors import AslsegError, BadImageError, BadLabelError, DiskFullError
from aslseg.files import atomic_file
from aslseg.types import Labels, Volume

IMAGE_EXTENSIONS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".mhd")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE_TOLERANCE_MM = 0.05
MAX_HEADER_BYTES = 1_000_000


def extension(path: Path) -> str | None:
    """The image extension of a file name, or None if it is no image or a hidden file."""
    name = path.name.lower()
    if name.startswith("."):
        return None
    return next((e for e in IMAGE_EXTENSIONS if name.endswith(e)), None)


def case_id(path: Path) -> str:
    """File name without its image extension."""
    found = extension(path)
    return path.name[: -len(found)] if found else path.stem


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
    array, affine = _read(path, max_voxels, BadImageError)
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise BadImageError(
            f"{path.name}: {count} voxels are NaN or infinite; expected finite intensities. "
            "Export the scan again or replace those voxels"
        )
    return Volume(array, affine)


def read_label(path: Path, image: Volume, labels: Labels, max_voxels: float = 1.6e9) -> np.ndarray:
    """Read the label of a scan.

    Args:
        path: Label file on the scan's own grid.
        image: The scan it belongs to.
        labels: Allowed values are 0..N.

    Returns:
        uint8 class map (i, j, k).

    Raises:
        BadLabelError: Unreadable, other shape or affine than the scan, or values outside 0..N.
    """
    array, affine = _read(path, max_voxels, BadLabelError)
    if array.shape != image.array.shape:
        raise BadLabelError(
            f"label {path.name}: shape {array.shape}, but its scan has {image.array.shape}; "
            "draw the label on the scan itself or resample it to the scan's grid"
        )
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * [*array.shape, 1]
    off = float(np.abs(corners @ (affine - image.affine).T).max())
    if off > max(AFFINE_TOLERANCE_MM, 0.1 * min(image.spacing)):
        raise BadLabelError(
            f"label {path.name}: its affine places it up to {off:.1f} mm away from its scan; "
            "save it with the scan's geometry"
        )
    values = np.unique(array)
    wrong = [float(v) for v in values if v not in range(len(labels) + 1)]
    if wrong:
        raise BadLabelError(
            f"label {path.name}: values {wrong[:5]} are not among 0..{len(labels)} "
            f"({', '.join(labels.names)}); set `labels` to what the file holds or correct the file"
        )
    return array.astype(np.uint8)


def write_label(path: Path, class_map: np.ndarray, affine: np.ndarray) -> None:
    """Write a uint8 class map (i, j, k) as NIfTI, atomically.

    Raises:
        DiskFullError, FileWriteError: The previous file, if any, is untouched.
    """
    image = nib.Nifti1Image(np.asarray(class_map, np.uint8), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    _save(image, path)


def write_image(path: Path, volume: Volume, dtype: type = np.int16) -> None:
    """Write a scan as NIfTI, atomically; rounded to ``dtype``."""
    array = np.rint(volume.array) if np.issubdtype(dtype, np.integer) else volume.array
    image = nib.Nifti1Image(array.astype(dtype), volume.affine)
    image.header.set_xyzt_units("mm")
    _save(image, path)


def _save(image: nib.Nifti1Image, path: Path) -> None:
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


def _read(path: Path, max_voxels: float, error: type[AslsegError]) -> tuple[np.ndarray, np.ndarray]:
    found = extension(path)
    if found is None:
        raise error(f"{path.name}: not an image file; expected one of {', '.join(IMAGE_EXTENSIONS)}")
    try:
        if found in (".nii.gz", ".nii"):
            return _read_nifti(path, max_voxels, error)
        _require_own_voxels(path, found, error)
        return _read_itk(path, max_voxels, error)
    except AslsegError:
        raise
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except PermissionError:
        raise error(f"{path}: may not be read; check its permissions") from None
    except MemoryError:
        raise error(f"{path.name}: not enough memory to read it; lower max_voxels or crop the scan") from None
    except (
        ImageFileError,
        HeaderDataError,
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        RuntimeError,
    ) as problem:
        first = str(problem).strip().splitlines()[0][:200] if str(problem).strip() else type(problem).__name__
        raise error(
            f"{path.name}: cannot be read as an image ({first}); it is truncated or not an image. "
            "Copy or export it again, or remove it"
        ) from None


def _read_nifti(path: Path, max_voxels: float, error: type[AslsegError]) -> tuple[np.ndarray, np.ndarray]:
    # never mapped: a scan that stays in memory must not change, or end the process, when its file is overwritten
    image: Any = nib.load(path, mmap=False)
    shape, affine = _checked(path, image.shape, image.affine, max_voxels, error)
    if image.get_data_dtype().kind not in "iuf":
        raise error(f"{path.name}: voxels of type {image.get_data_dtype()}; expected real numbers")
    return np.asarray(image.dataobj, np.float32).reshape(shape), affine


def _require_own_voxels(path: Path, found: str, error: type[AslsegError]) -> None:
    """Refuse headers that fetch their voxels elsewhere: an uploaded one could show any file of the server.

    Only an .mhd has its voxels outside by nature; they must be a .raw or .zraw file beside it.
    """
    with path.open("rb") as file:
        text = file.read(MAX_HEADER_BYTES).decode("latin-1")
    if found.endswith("nrrd"):
        header = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
        named = re.search(r"(?im)^\s*data ?file\s*:=?\s*(.*)", header)
        own = named is None and len(header) < MAX_HEADER_BYTES
    else:
        named = re.search(r"(?im)^\s*ElementDataFile\s*[=:]\s*(.*)", text)
        value = named[1].strip() if named else ""
        beside = re.fullmatch(r"[^/\\%]+\.z?raw", value) is not None and not (path.parent / value).is_symlink()
        # a header that names no file at all is left to the reader, which refuses it
        unnamed = named is None and len(text) < MAX_HEADER_BYTES
        own = unnamed or value.upper() == "LOCAL" or (found == ".mhd" and beside)
    if not own:
        where = repr(named[1].strip()[:100]) if named else "nowhere in its header"
        raise error(
            f"{path.name}: its voxels lie in another file ({where}), which is not followed; "
            "save the scan as one file, as NIfTI or NRRD"
        )


def _read_itk(path: Path, max_voxels: float, error: type[AslsegError]) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    dimension = reader.GetDimension()
    if dimension < 3 or reader.GetNumberOfComponents() != 1:
        raise error(
            f"{path.name}: {dimension}-D with {reader.GetNumberOfComponents()} components; expected one 3-D volume"
        )
    direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(reader.GetSpacing())[:3]
    affine[:3, 3] = np.array(reader.GetOrigin())[:3]
    shape, affine = _checked(path, reader.GetSize(), LPS_TO_RAS @ affine, max_voxels, error)
    array = sitk.GetArrayFromImage(reader.Execute())
    return array.transpose(*range(array.ndim)[::-1]).astype(np.float32).reshape(shape), affine


def _checked(
    path: Path, shape: tuple[int, ...], affine: np.ndarray, max_voxels: float, error: type[AslsegError]
) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape without trailing ones and affine as float64, or an error that says what the header claims."""
    shape = tuple(int(n) for n in shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise error(f"{path.name}: shape {shape}; expected one 3-D volume. Split series before adding them")
    if math.prod(shape) > max_voxels:
        raise error(f"{path.name}: {math.prod(shape):.3g} voxels, more than max_voxels = {max_voxels:.3g}")
    affine = np.asarray(affine, np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if spacing.min() < 0.01 or spacing.max() > 50 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.5:
        raise error(
            f"{path.name}: impossible geometry (voxel size {np.round(spacing, 4).tolist()} mm); "
            "expected 0.01-50 mm and near-orthogonal axes. Export the scan again"
        )
    return shape, affine
