"""MetaImage headers (https://itk.org/Wiki/MetaIO/Documentation), of ``.mha`` and ``.mhd`` files."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import IO

import numpy as np

from aslseg.volume.stored import (
    LPS_TO_RAS,
    MAX_HEADER_BYTES,
    RefusedFileError,
    StoredVolume,
    decode_text,
    decompressed,
)

TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
DATA_FILE = "ElementDataFile"


def open_metaimage(file: IO[bytes], beside: Callable[[str], IO[bytes]] | None) -> StoredVolume:
    """Parse a MetaImage file.

    Args:
        file: The header, with the voxels behind it where it says ``LOCAL``.
        beside: Opens the voxel file of that name beside an ``.mhd`` header; None where voxels must be in the file.

    Raises:
        RefusedFileError: Voxels in another file.
        ValueError, KeyError: No MetaImage.
    """
    fields = _read_header(file)
    dimension = int(fields["NDims"])
    sizes = [int(n) for n in fields["DimSize"].split()]
    if len(sizes) != dimension:
        raise ValueError(f"{dimension} dimensions but {len(sizes)} sizes")
    if fields["ElementType"] not in TYPES:
        raise RefusedFileError(f"voxels of type {fields['ElementType']}; expected real numbers")
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    big = _true(_first(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB") or "False")
    stream = _voxel_file(file, fields[DATA_FILE], beside)
    skipped = int(fields.get("HeaderSize", "0"))
    if skipped < 0 or len(stream.read(skipped)) != skipped:
        raise RefusedFileError("its voxels do not begin where its header ends; save it as NIfTI or NRRD")
    text = not _true(fields.get("BinaryData", "True"))
    packed = _true(fields.get("CompressedData", "False"))
    return StoredVolume(
        shape=(channels, *sizes) if channels > 1 else tuple(sizes),
        affine=_affine(fields, dimension),
        dtype=np.dtype((">" if big else "<") + TYPES[fields["ElementType"]]),
        stream=decompressed(stream, "zlib" if packed else "raw"),
        layers=0 if channels > 1 else None,
        compressed=packed,
        text=text,
    )


def _read_header(file: IO[bytes]) -> dict[str, str]:
    """The fields up to ``ElementDataFile``, behind which the voxels begin."""
    start = file.read(MAX_HEADER_BYTES)
    end = re.search(rb"(?im)^[ \t]*ElementDataFile[ \t]*[=:][^\n]*(\n|\Z)", start)
    if end is None:
        raise ValueError("no MetaImage header")
    file.seek(end.end())
    fields: dict[str, str] = {}
    for line in decode_text(start[: end.end()]).splitlines():
        key, _, value = re.sub(r"^([^=:]*):", r"\1=", line).partition("=")
        if key.strip() in fields:
            raise RefusedFileError(f"header field {key.strip()[:60]!r} stands there twice; save it again")
        fields[key.strip()] = value.strip()
    if DATA_FILE not in fields:
        raise RefusedFileError(f"a header without {DATA_FILE} in this spelling; save it again")
    return fields


def _voxel_file(file: IO[bytes], name: str, beside: Callable[[str], IO[bytes]] | None) -> IO[bytes]:
    if name.upper() == "LOCAL":
        return file
    if beside is not None and re.fullmatch(r"[^/\\%]+\.z?raw", name):
        return beside(name)
    raise RefusedFileError(
        f"its voxels lie in another file ({name[:100]!r}), which is not followed; "
        "save the scan as one file, as NIfTI or NRRD"
    )


def _affine(fields: dict[str, str], dimension: int) -> np.ndarray:
    sizes = _numbers(_first(fields, "ElementSpacing", "ElementSize"), dimension, np.ones(dimension))
    matrix = _numbers(_first(fields, "TransformMatrix", "Rotation", "Orientation"), dimension**2, np.eye(dimension))
    origin = _numbers(_first(fields, "Offset", "Position", "Origin"), dimension, np.zeros(dimension))
    affine = np.eye(4)
    # a row of the matrix is the direction of an axis
    affine[:3, :3] = matrix.reshape(dimension, dimension)[:3, :3].T * sizes[:3]
    affine[:3, 3] = origin[:3]
    return LPS_TO_RAS @ affine


def _numbers(text: str | None, count: int, default: np.ndarray) -> np.ndarray:
    if text is None:
        return default
    found = np.array([float(n) for n in text.split()])
    if len(found) != count:
        raise ValueError(f"{len(found)} numbers where {count} are expected")
    return found


def _first(fields: dict[str, str], *names: str) -> str | None:
    return next((fields[n] for n in names if n in fields), None)


def _true(text: str) -> bool:
    return text[:1].upper() in ("T", "1")
