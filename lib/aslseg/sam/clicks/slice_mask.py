"""The object on one slice, and the intensities by which it is known again on others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CROP_MARGIN = 8  # pixels kept around the mask beyond the box margin: a mask prompt uses them
MIN_DEVIATION = 0.02  # of intensities; objects without texture would match nothing otherwise


@dataclass(frozen=True, eq=False)
class SliceMask:
    """An object on one slice. Compared by identity: the same instance means that nothing changed.

    Attributes:
        shape: Of the slice, (i, j).
        corner: First row and column of ``probability``.
        probability: float16, cropped to the mask and what its prompt may use; 0 elsewhere.
        inside: Where it reaches 0.5, bool, cropped alike. Stored column by column, as the voxels of a scan are in a
            reply: every reply shows it, and transposing it there is slow.
        kept: (i, j) bool, or None: components of the automatic mask that stay beside what is drawn.
        replaced: (i, j) bool, or None: components of the automatic mask that are drawn anew.
    """

    shape: tuple[int, int]
    corner: tuple[int, int]
    probability: np.ndarray
    inside: np.ndarray
    kept: np.ndarray | None = None
    replaced: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        probability: np.ndarray,
        margin: float,
        kept: np.ndarray | None = None,
        replaced: np.ndarray | None = None,
    ) -> SliceMask:
        """From probabilities (i, j), cropped at ``margin`` and a few pixels more around the mask."""
        shape = (probability.shape[0], probability.shape[1])
        inside = probability >= 0.5
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            return cls(shape, (0, 0), np.zeros((0, 0), np.float16), np.zeros((0, 0), bool), kept, replaced)
        wide = int(margin) + CROP_MARGIN
        i0, j0 = max(rows[0] - wide, 0), max(columns[0] - wide, 0)
        cut = slice(i0, rows[-1] + wide + 1), slice(j0, columns[-1] + wide + 1)
        crop = probability[cut].astype(np.float16)
        # 0.4999 must not become 0.5 by rounding
        np.minimum(crop, np.float16(0.4998), out=crop, where=~inside[cut])
        return cls(shape, (int(i0), int(j0)), crop, np.asfortranarray(inside[cut]), kept, replaced)

    @property
    def cut(self) -> tuple[slice, slice]:
        """Where on the slice the cropped arrays lie."""
        (i, j), (rows, columns) = self.corner, self.probability.shape
        return slice(i, i + rows), slice(j, j + columns)

    @property
    def drawn(self) -> np.ndarray:
        """Probabilities (i, j) of what was drawn, float32."""
        out = np.zeros(self.shape, np.float32)
        out[self.cut] = self.probability
        return out

    @property
    def shown(self) -> np.ndarray:
        """Probabilities (i, j) of what was drawn and, 1, of what was kept, float32."""
        return self.drawn if self.kept is None else np.maximum(self.drawn, self.kept)

    @property
    def mask(self) -> np.ndarray:
        """The object (i, j), bool: what was drawn and what was kept."""
        mask = np.zeros(self.shape, bool, order="F")
        mask[self.cut] = self.inside
        return mask if self.kept is None else mask | self.kept

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        arrays = self.probability, self.inside, self.kept, self.replaced
        return sum(a.nbytes for a in arrays if a is not None)


@dataclass(frozen=True)
class IntensityStats:
    """Median and standard deviation of the object's intensities (0..1) on the clicked slices."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: np.ndarray) -> IntensityStats:
        """Of intensities (n,); those of no pixel match nothing."""
        return cls(float(np.median(values)), float(values.std())) if values.size else cls(np.inf, 0.0)

    def matches(self, values: np.ndarray, max_deviations: float) -> bool:
        """Whether the median of other intensities (n,) lies within so many standard deviations."""
        allowed = max_deviations * max(self.spread, MIN_DEVIATION)
        return bool(values.size) and abs(float(np.median(values)) - self.median) <= allowed


def components_containing(components: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """The components (i, j) of a labelled image that have a pixel in ``hit``, as bool."""
    numbers = np.unique(components[hit])
    return np.isin(components, numbers[numbers > 0])
