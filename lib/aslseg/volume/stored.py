"""A volume as it lies in a file: what its header claims, and its voxels read no further than the header says.

The parsers of this package (:mod:`aslseg.volume.nifti`, :mod:`aslseg.volume.nrrd`, :mod:`aslseg.volume.metaimage`)
work on an open stream and know no other path, so a header that names another file cannot make them open it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

CHUNK_BYTES = 1 << 22
MAX_HEADER_BYTES = 1_000_000
MOST_TRAILING_BYTES = 1 << 20
MOST_BYTES_PER_NUMBER = 32  # of text; longer than any float64 and its separator
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class RefusedFileError(ValueError):
    """A file that is read by its rules but is not what is wanted; the message says what to do."""


@dataclass(frozen=True)
class StoredVolume:
    """The header of a volume, and the stream that gives its voxels.

    Attributes:
        shape: Sizes in the order in which the voxels lie, the fastest first.
        affine: 4 x 4, voxel index to RAS mm, of the spatial axes.
        dtype: Type of the stored numbers.
        stream: Open and decompressing, at the first voxel.
        layers: Axis of ``shape`` that is no direction in space (layers, channels), or None.
        compressed: Whether the stream has a checksum at its end.
        text: Whether the voxels are written as decimal numbers.
        slope, intercept: What turns the stored numbers into voxel values.
        fields: Further key/value pairs of the header, as Slicer's ``Segment0_Name``.
        notes: What a person should know about how the header was understood.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    dtype: np.dtype[Any]
    stream: IO[bytes]
    layers: int | None = None
    compressed: bool = False
    text: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    fields: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Sizes of the axes in space, without trailing axes of length one."""
        shape = [n for axis, n in enumerate(self.shape) if axis != self.layers]
        while len(shape) > 3 and shape[-1] == 1:
            shape.pop()
        return tuple(shape)

    @property
    def layer_count(self) -> int:
        """How many layers or channels lie at each place."""
        return 1 if self.layers is None else self.shape[self.layers]

    def voxels(self) -> np.ndarray:
        """Read the voxels, never more bytes than the header declares.

        Returns:
            (layers, i, j, k) in the stored type, float32 where the header scales.

        Raises:
            EOFError: The file ends before.
            MemoryError: The machine, or the limit of this process, is too small.
        """
        count = math.prod(self.shape)
        if self.text:
            flat = self._numbers(count)
        else:
            flat = read_exactly(self.stream, count * self.dtype.itemsize).view(self.dtype)
        if self.compressed:
            self.stream.read(MOST_TRAILING_BYTES)  # checks the sum at the end, which reading the last voxel does not
        array = flat.reshape(self.shape, order="F")
        array = array[None] if self.layers is None else np.moveaxis(array, self.layers, 0)
        array = array.reshape(self.layer_count, *self.spatial_shape, order="F")
        if (self.slope, self.intercept) != (1.0, 0.0):
            array = array.astype(np.float32, copy=False) * np.float32(self.slope) + np.float32(self.intercept)
        return array

    def _numbers(self, count: int) -> np.ndarray:
        numbers = self.stream.read(count * MOST_BYTES_PER_NUMBER).split()[:count]
        if len(numbers) < count:
            raise EOFError(f"{len(numbers)} of {count} voxels")
        return np.array(numbers, np.float64).astype(self.dtype)


def read_exactly(stream: IO[bytes], count: int) -> np.ndarray:
    """The next ``count`` bytes, as uint8; in pieces, so that no decompressor gets ahead.

    Raises:
        EOFError: The stream ends before.
    """
    out = np.empty(count, np.uint8)
    view, done = out.data, 0
    while done < count:
        got = stream.readinto(view[done : done + CHUNK_BYTES])  # type: ignore[attr-defined]
        if not got:
            raise EOFError(f"{done} of {count} bytes of voxels")
        done += got
    return out


def decompressed(stream: IO[bytes], encoding: str) -> IO[bytes]:
    """A stream that inflates on demand.

    Args:
        stream: At the first compressed byte.
        encoding: ``raw``, ``gzip``, ``bzip2`` or ``zlib``.
    """
    readers: dict[str, Callable[[], Any]] = {
        "raw": lambda: stream,
        "gzip": lambda: gzip.GzipFile(fileobj=stream, mode="rb"),
        "bzip2": lambda: bz2.BZ2File(stream, "rb"),
        "zlib": lambda: io.BufferedReader(_Zlib(stream), CHUNK_BYTES),
    }
    return readers[encoding]()


class _Zlib(io.RawIOBase):
    """Inflates a zlib stream as it is read, never more than was asked for."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._inflate = stream, zlib.decompressobj(47)  # zlib or gzip by its header, as MetaIO reads it

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._stream.read(1 << 16)
            if not packed:
                raise EOFError("the compressed voxels end too early")
            found = self._inflate.decompress(packed, len(view))
            if found:
                view[: len(found)] = found
                return len(found)
        return 0


def decode_text(raw: bytes) -> str:
    """Header text, which is UTF-8 in practice; older programs wrote Latin-1.

    Raises:
        RefusedFileError: Control characters, which other readers may take for the end of a line.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if any(ord(c) < 32 and c != "\t" for line in text.split("\n") for c in line.removesuffix("\r")):
        raise RefusedFileError("control characters in its header; save it again as NIfTI or NRRD")
    return text
