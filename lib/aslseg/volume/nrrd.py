"""NRRD headers (https://teem.sourceforge.net/nrrd/format.html), attached voxels only.

Only the fields of the format are accepted, one a line, so that no other reader can see in a stored file what this one
does not. ``data file``, which would fetch the voxels from elsewhere, is refused.
"""

from __future__ import annotations

import re
from typing import IO, Any

import numpy as np

from aslseg.volume.stored import (
    LPS_TO_RAS,
    MAX_HEADER_BYTES,
    RefusedFileError,
    StoredVolume,
    decode_text,
    decompressed,
)

KNOWN = {
    *("dimension", "type", "block size", "encoding", "endian", "content", "min", "max", "old min", "old max"),
    *("data file", "line skip", "byte skip", "number", "sample units", "sizes", "spacings", "thicknesses"),
    *("axis mins", "axis maxs", "centers", "centerings", "labels", "units", "kinds", "space", "space dimension"),
    *("space units", "space origin", "space directions", "measurement frame"),
}
SPELLED = {name.replace(" ", ""): name for name in KNOWN}  # the format allows "datafile" for "data file"
TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
DTYPES = {name: dtype for dtype, names in TYPES.items() for name in names}
ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
TEXT = {"ascii", "text", "txt"}
TO_RAS = {
    **dict.fromkeys(("right-anterior-superior", "ras"), np.eye(4)),
    **dict.fromkeys(("left-anterior-superior", "las"), np.diag([-1.0, 1.0, 1.0, 1.0])),
}  # every other space is taken for left-posterior-superior, as ITK does
IN_SPACE = {"domain", "space"}
PER_AXIS = re.compile(r"none|\([^)]*\)")


def open_nrrd(file: IO[bytes]) -> StoredVolume:
    """Parse an NRRD file with its voxels behind the header.

    Raises:
        RefusedFileError: Voxels in another file, unknown fields, an encoding that is not supported.
        ValueError, KeyError: No NRRD.
    """
    fields, pairs = _read_header(file)
    sizes = [int(n) for n in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]):
        raise ValueError(f"dimension {fields['dimension']} but {len(sizes)} sizes")
    encoding = fields["encoding"].lower()
    if encoding not in ENCODINGS and encoding not in TEXT:
        raise RefusedFileError(f"encoding {encoding!r}; expected raw, gzip, bzip2 or ascii. Save it as NIfTI or NRRD")
    if any(fields.get(name, "0") != "0" for name in ("line skip", "byte skip")):
        raise RefusedFileError("it skips lines or bytes before its voxels; save it as NIfTI or NRRD")
    if fields["type"].lower() not in DTYPES:
        raise RefusedFileError(f"voxels of type {fields['type']}; expected real numbers")
    order = ">" if fields.get("endian", "little").lower() == "big" else "<"
    layers = _layers(fields, len(sizes))
    text = encoding in TEXT
    return StoredVolume(
        shape=tuple(sizes),
        affine=_affine(fields, len(sizes), layers),
        dtype=np.dtype(order + DTYPES[fields["type"].lower()]),
        stream=file if text else decompressed(file, ENCODINGS[encoding]),
        layers=layers,
        compressed=not text and ENCODINGS[encoding] != "raw",
        text=text,
        fields=pairs,
    )


def _read_header(file: IO[bytes]) -> tuple[dict[str, str], dict[str, str]]:
    """Fields and key/value pairs; the file is left at the first byte behind the header."""
    start = file.read(MAX_HEADER_BYTES)
    # a header whose voxels lie elsewhere may end with its file
    end = re.search(rb"\r?\n\r?\n" if len(start) == MAX_HEADER_BYTES else rb"\r?\n\r?\n|\Z", start)
    if end is None or not re.match(rb"NRRD000[1-5]\r?\n", start):
        raise ValueError("no NRRD header of version 1 to 5")
    file.seek(end.end())
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for line in decode_text(start[: end.start()]).split("\n")[1:]:
        line = line.removesuffix("\r")
        if not line or line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        if value.startswith("="):
            pairs[key] = value[1:].strip().replace("\\n", "\n")
            continue
        name = SPELLED.get(re.sub(r"\s", "", key).lower())
        if not colon or name is None or name in fields:
            raise RefusedFileError(f"header line {line[:60]!r}, which is not part of the format; save it again")
        if name == "data file":
            raise RefusedFileError(
                f"its voxels lie in another file ({value.strip()[:100]!r}), which is not followed; "
                "save the scan as one file, as NIfTI or NRRD"
            )
        fields[name] = value.strip()
    return fields, pairs


def _layers(fields: dict[str, str], dimension: int) -> int | None:
    """The axis that is no direction in space."""
    kinds = fields.get("kinds", "").lower().split()
    directions = PER_AXIS.findall(fields.get("space directions", ""))
    found = [n for n, kind in enumerate(kinds) if kind not in IN_SPACE | {"???", "none"}]
    found = found or [n for n, vector in enumerate(directions) if _outside(vector)]
    return found[0] if len(found) == 1 and dimension > 3 else None


def _outside(vector: str) -> bool:
    return vector == "none" or "nan" in vector.lower()


def _affine(fields: dict[str, str], dimension: int, layers: int | None) -> np.ndarray:
    vectors = PER_AXIS.findall(fields.get("space directions", ""))
    axes = [n for n in range(dimension) if n != layers][:3]
    affine = np.eye(4)
    if vectors:
        if len(vectors) != dimension:
            raise ValueError(f"{len(vectors)} space directions for {dimension} axes")
        for column, axis in enumerate(axes):
            if not _outside(vectors[axis]):
                affine[:3, column] = _vector(vectors[axis])
    elif "spacings" in fields:
        sizes = [float(n) for n in fields["spacings"].split()]
        for column, axis in enumerate(axes):
            affine[column, column] = 1.0 if np.isnan(sizes[axis]) else sizes[axis]
    if "space origin" in fields:
        affine[:3, 3] = _vector(fields["space origin"])
    return TO_RAS.get(fields.get("space", "").lower(), LPS_TO_RAS) @ affine


def _vector(text: str) -> Any:
    numbers = [float(n) for n in text.strip("() ").split(",")]
    if len(numbers) != 3:
        raise ValueError(f"a vector of {len(numbers)} numbers; expected three")
    return numbers
