"""Image files by their name and header: opened for their voxels, refused with a message that names the file."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from aslseg.errors import AslsegError, BadImageError
from aslseg.volume.metaimage import open_metaimage
from aslseg.volume.nifti import open_nifti
from aslseg.volume.nrrd import open_nrrd
from aslseg.volume.stored import RefusedFileError, StoredVolume

logger = logging.getLogger(__name__)

# what the parsers and decompressors raise on damaged files
UNREADABLE = (HeaderDataError, WrapStructError, OSError, EOFError, zlib.error, ValueError, OverflowError, LookupError)
Z_MEM_ERROR = -4  # the decompressor's, which Python raises as a damaged file
IMAGE_EXTENSIONS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".mhd")


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


@contextmanager
def open_volume(path: Path, error: type[AslsegError] = BadImageError, alone: bool = False) -> Iterator[StoredVolume]:
    """Parse the header of a file and hold it open for its voxels.

    Args:
        path: NIfTI, NRRD or MetaImage file.
        error: What is raised.
        alone: Refuse an ``.mhd`` header whose voxels lie in a ``.raw`` file beside it.

    Raises:
        AslsegError: Of type ``error``: no image, damaged, or not readable.
    """
    found = extension(path)
    if found is None:
        raise error(f"{path.name}: not an image file; expected one of {', '.join(IMAGE_EXTENSIONS)}")
    with ExitStack() as files, _named_errors(path, error):
        file = files.enter_context(path.open("rb"))
        if found in (".nii.gz", ".nii"):
            stored = open_nifti(file)
        elif found.endswith("nrrd"):
            stored = open_nrrd(file)
        else:
            beside = None if alone or found == ".mha" else lambda name: files.enter_context(_beside(path, name))
            stored = open_metaimage(file, beside)
        _check_header(path, stored, error)
        yield stored


def _beside(path: Path, name: str) -> IO[bytes]:
    voxels = path.parent / name
    if voxels.is_symlink():
        raise RefusedFileError(f"its voxels lie in another file ({name!r}) behind a link, which is not followed")
    return voxels.open("rb")


@contextmanager
def _named_errors(path: Path, error: type[AslsegError]) -> Iterator[None]:
    """Whatever a reader raises, as an error that names the file."""
    try:
        yield
    except AslsegError:
        raise
    except RefusedFileError as problem:
        raise error(f"{path.name}: {problem}") from None
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except PermissionError:
        raise error(f"{path}: may not be read; check its permissions") from None
    except MemoryError:
        raise error(_no_memory(path)) from None
    except UNREADABLE as problem:
        if isinstance(problem, zlib.error) and str(problem).startswith(f"Error {Z_MEM_ERROR} "):
            raise error(_no_memory(path)) from None
        first = str(problem).strip().splitlines()[0][:200] if str(problem).strip() else type(problem).__name__
        raise error(
            f"{path.name}: cannot be read as an image ({first}); it is truncated or not an image. "
            "Copy or export it again, or remove it"
        ) from None


def _no_memory(path: Path) -> str:
    return f"{path.name}: not enough memory to read it; lower max_voxels or crop the scan"


def _check_header(path: Path, stored: StoredVolume, error: type[AslsegError]) -> None:
    """Refuse what cannot be one volume in space."""
    shape, affine = stored.spatial_shape, stored.affine
    if len(shape) != 3 or min(stored.shape) < 1:
        raise error(f"{path.name}: shape {stored.shape}; expected one 3-D volume. Split series before adding them")
    spacing = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if spacing.min() < 0.01 or spacing.max() > 50 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.5:
        raise error(
            f"{path.name}: impossible geometry (voxel size {np.round(spacing, 4).tolist()} mm); "
            "expected 0.01-50 mm and near-orthogonal axes. Export the scan again"
        )


def require_size(name: str, stored: StoredVolume, most: float, error: type[AslsegError], setting: str) -> None:
    """Refuse a header that declares more voxels than are wanted, before anything is inflated."""
    declared = math.prod(stored.shape)
    if declared > most:
        raise error(f"{name}: {declared:.3g} voxels, more than {setting} = {most:.3g}")


def require_one_channel(name: str, stored: StoredVolume, error: type[AslsegError]) -> None:
    """Refuse several values at one place."""
    if stored.layer_count != 1:
        raise error(f"{name}: 3-D with {stored.layer_count} components; expected one 3-D volume")


@lru_cache(maxsize=4096)
def say_once(message: str) -> None:
    """Log what is unusual about a file, once for each process however often the file is read."""
    logger.warning("%s", message)
