"""Masks as bytes for clients: a gzip stream that compresses empty slices once, and NRRD around it.

Most slices of a mask are empty. One of them is compressed once and its bytes are repeated; its checksum too, since
appending a fixed block to data changes a CRC by an affine map over GF(2). The result is one ordinary gzip stream, as
Slicer's and OHIF's readers and browsers expect.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

from aslseg.volume.io import LPS_TO_RAS

LEVEL = 1
BLOCK = 1 << 18
GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
LAST_BLOCK = b"\x03\x00"


def gzipped(blocks: Iterable[memoryview | bytes]) -> bytes:
    """The blocks one after the other as a single gzip stream.

    Args:
        blocks: Bytes; empty ones (all zero) of equal length are cheap.
    """
    out, crc, total = [GZIP_HEADER], 0, 0
    for block in blocks:
        length = len(block)
        if length and not np.frombuffer(block, np.uint8).any():
            compressed, advance = _zeros(length)
            out.append(compressed)
            crc = advance(crc)
        else:
            out.append(_deflated(block))
            crc = zlib.crc32(block, crc)
        total += length
    return b"".join([*out, LAST_BLOCK, struct.pack("<II", crc, total & 0xFFFFFFFF)])


def gzipped_bytes(content: bytes | memoryview) -> bytes:
    """Any bytes as a gzip stream."""
    view = memoryview(content)
    return gzipped(view[start : start + BLOCK] for start in range(0, len(view), BLOCK))


def nrrd(class_map: np.ndarray, affine: np.ndarray, compress: bool) -> bytes:
    """A mask as an NRRD file.

    Args:
        class_map: (i, j, k) uint8; its voxels are written in this order, i fastest.
        affine: Voxel index to RAS mm, 4 x 4.
        compress: gzip instead of raw.
    """
    lps = LPS_TO_RAS @ affine
    directions = " ".join(_vector(lps[:3, axis]) for axis in range(3))
    header = "\n".join(
        (
            "NRRD0004",
            "# Complete NRRD file format specification at:",
            "# http://teem.sourceforge.net/nrrd/format.html",
            "type: unsigned char",
            "dimension: 3",
            "space: left-posterior-superior",
            "sizes: " + " ".join(map(str, class_map.shape)),
            f"space directions: {directions}",
            "kinds: domain domain domain",
            "endian: little",
            f"encoding: {'gzip' if compress else 'raw'}",
            f"space origin: {_vector(lps[:3, 3])}",
        )
    )
    voxels = np.ascontiguousarray(class_map.T)
    body = gzipped(memoryview(one).cast("B") for one in voxels) if compress else voxels.tobytes()
    return f"{header}\n\n".encode() + body


def _vector(numbers: np.ndarray) -> str:
    return f"({','.join(repr(float(n)) for n in numbers)})"


def _deflated(block: memoryview | bytes, level: int = LEVEL) -> bytes:
    """A raw deflate piece that ends on a byte and refers to nothing before it."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)


@cache
def _zeros(length: int) -> tuple[bytes, Callable[[int], int]]:
    """A block of zero bytes, compressed, and the function by which appending it changes a CRC."""
    block = bytes(length)
    constant = zlib.crc32(block, 0)
    columns = [zlib.crc32(block, 1 << bit) ^ constant for bit in range(32)]

    def advance(crc: int) -> int:
        out = constant
        for bit in range(32):
            if crc >> bit & 1:
                out ^= columns[bit]
        return out

    return _deflated(block, level=9), advance
