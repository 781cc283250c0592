"""NIfTI headers, with the geometry that ITK, and so 3D Slicer and OHIF's server side, take from them."""

from __future__ import annotations

import io
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from aslseg.volume.stored import LPS_TO_RAS, MAX_HEADER_BYTES, RefusedFileError, StoredVolume, decompressed

GZIP_MAGIC = b"\x1f\x8b"
HEADERS: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
SCANNER = 1  # NIFTI_XFORM_SCANNER_ANAT
MM_PER_UNIT = {1: 1e3, 3: 1e-3}  # metres, micrometres; everything else is taken for millimetres
SIMILAR = 1e-4


def open_nifti(file: IO[bytes]) -> StoredVolume:
    """Parse a NIfTI file, packed or not whatever its name says.

    Raises:
        RefusedFileError: Voxels that are no real numbers, or that lie in an ``.img`` file.
        HeaderDataError, ValueError, EOFError: No NIfTI.
    """
    packed = file.read(2) == GZIP_MAGIC
    file.seek(0)
    stream = decompressed(file, "gzip" if packed else "raw")
    header, consumed = _read_header(stream)
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise RefusedFileError(f"voxels of type {dtype}; expected real numbers")
    _skip(stream, int(header.get_data_offset()) - consumed)
    slope, intercept = header.get_slope_inter()
    affine, notes = _affine(header)
    return StoredVolume(
        shape=tuple(int(n) for n in header.get_data_shape()),
        affine=affine,
        dtype=dtype,
        stream=stream,
        compressed=packed,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        notes=notes,
    )


def _read_header(stream: IO[bytes]) -> tuple[Any, int]:
    """The header, and the number of bytes that it takes."""
    start = stream.read(4)
    size = next((n for n in HEADERS for order in ("little", "big") if start == n.to_bytes(4, order)), None)
    if size is None:
        raise ValueError("no NIfTI header")
    raw = start + stream.read(size - 4)
    header = HEADERS[size].from_fileobj(io.BytesIO(raw))
    if bytes(header["magic"])[:2] != b"n+":
        raise RefusedFileError("its voxels lie in another file (.img), which is not followed; save it as one .nii.gz")
    return header, size


def _skip(stream: IO[bytes], count: int) -> None:
    """Pass over the extensions between header and voxels."""
    if not 0 <= count <= MAX_HEADER_BYTES * 64:
        raise ValueError(f"voxels that begin {count} bytes after the header")
    while count > 0:
        got = len(stream.read(min(count, MAX_HEADER_BYTES)))
        if not got:
            raise EOFError("ends before its voxels")
        count -= got


def _affine(header: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Choose between the two transforms of the header as ITK does.

    ``NiftiImageIO::SetImageIOOrientationFromNIfTI`` (Modules/IO/NIFTI/src/itkNiftiImageIO.cxx in ITK 5.4): with
    neither form known, the origin is zero and the axes run to the left, back and up; the sform is taken where it is
    orthogonal and either the only one, or marked as scanner coordinates, or equal to the qform; else the qform. The
    voxel size is always ``pixdim``, in ``xyzt_units``.

    Returns:
        Voxel index to RAS mm, and notes on what is unusual.
    """
    s_code, q_code = int(header["sform_code"]), int(header["qform_code"])
    sizes = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    notes: list[str] = []
    sform, qform = np.asarray(header.get_sform(), np.float64), _qform(header)
    if not s_code and not q_code:
        notes.append("its header says nothing of orientation and place; taken as 3D Slicer takes it, from the origin")
        affine = LPS_TO_RAS @ np.diag([*sizes, 1.0])
    else:
        affine = _chosen(sform, s_code, qform, q_code, notes)
        affine = _with_sizes(affine, sizes, notes)
    factor = MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    if factor != 1.0:
        notes.append(f"its header is in {'metres' if factor > 1 else 'micrometres'}; converted to millimetres")
        affine = np.diag([factor, factor, factor, 1.0]) @ affine
    return affine, tuple(notes)


def _chosen(sform: np.ndarray, s_code: int, qform: np.ndarray | None, q_code: int, notes: list[str]) -> np.ndarray:
    usable = bool(s_code) and _orthogonal(sform)
    if qform is None or not q_code:
        if not usable:
            notes.append("its axes are not at right angles; 3D Slicer cannot open it")
        return sform
    apart = not s_code or not np.allclose(sform, qform, atol=SIMILAR)
    if not s_code or not apart:
        return qform if not usable else sform
    takes_sform = usable and s_code == SCANNER
    notes.append(
        f"its header places it twice, up to {np.abs(sform - qform).max():.3g} mm apart; "
        f"the {'sform' if takes_sform else 'qform'} is taken, as in 3D Slicer"
    )
    return sform if takes_sform else qform


def _with_sizes(affine: np.ndarray, sizes: np.ndarray, notes: list[str]) -> np.ndarray:
    """The transform with the voxel sizes of ``pixdim``."""
    scale = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not scale.all() or np.allclose(scale, sizes, rtol=1e-3, atol=1e-3):
        return affine
    notes.append(
        f"its header gives two voxel sizes, {_mm(scale)} and {_mm(sizes)}; the second is taken, as in 3D Slicer"
    )
    return affine @ np.diag([*(sizes / scale), 1.0])


def _mm(sizes: np.ndarray) -> str:
    return " x ".join(f"{n:.4g}" for n in sizes)


def _orthogonal(affine: np.ndarray) -> bool:
    if not np.isfinite(affine).all():
        return False
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    if not norms.all():
        return False
    unit = affine[:3, :3] / norms
    return bool(np.allclose(unit @ unit.T, np.eye(3), atol=SIMILAR))


def _qform(header: Any) -> np.ndarray | None:
    try:
        return np.asarray(header.get_qform(), np.float64)
    except HeaderDataError:  # a quaternion longer than one
        return None
