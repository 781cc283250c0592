"""From a slice to the next: the object's mask there prompts SAM here, until something says that it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from aslseg.prompts.frame import SlicePrompt
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS, slice_prompts
from aslseg.settings import Settings

CROP = 8  # pixels kept around the mask beyond the box margin: what a mask prompt may use


@dataclass(frozen=True, eq=False)
class SliceMask:
    """An object on one slice. Kept by identity: the same object means that nothing changed.

    Attributes:
        shape: Of the slice, (i, j).
        corner: First row and column of ``probability``.
        probability: float16, cropped to the mask and what its prompt may use; 0 elsewhere.
        inside: Where it reaches 0.5, bool, cropped alike. Column by column, as a scan's voxels lie in a reply: replies
            show it on every slice, and turning it there would take longer than SAM's answer.
        kept: (i, j) bool, or None: components of the automatic mask that stay beside what is drawn.
        replaced: (i, j) bool, or None: those that are drawn anew.
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
        """From probabilities (i, j), which are cut off ``margin`` and a little around the mask."""
        shape = (probability.shape[0], probability.shape[1])
        inside = probability >= 0.5
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            return cls(shape, (0, 0), np.zeros((0, 0), np.float16), np.zeros((0, 0), bool), kept, replaced)
        wide = int(margin) + CROP
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
        """Memory held."""
        arrays = self.probability, self.inside, self.kept, self.replaced
        return sum(a.nbytes for a in arrays if a is not None)


@dataclass(frozen=True)
class IntensityStats:
    """Median and standard deviation of the object's intensities (0..1) on the clicked slices."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: np.ndarray) -> IntensityStats:
        """Of intensities (n,); of none, a look that nothing has."""
        return cls(float(np.median(values)), float(values.std())) if values.size else cls(np.inf, 0.0)

    def matches(self, values: np.ndarray, most: float) -> bool:
        """Whether other intensities are alike. Beyond an object's end SAM tends to copy the mask that prompts it."""
        return bool(values.size) and abs(float(np.median(values)) - self.median) <= most * max(self.spread, 0.02)


def neighbour_prompts(
    before: np.ndarray, points: np.ndarray, labels: np.ndarray, settings: Settings, scale: float
) -> list[SlicePrompt]:
    """Prompts for a slice from the object's probabilities (i, j) on the slice before it and the clicks on its own."""
    return [
        SlicePrompt(
            part.box,
            np.concatenate([part.points, points]),
            np.concatenate([part.point_labels, labels]),
            part.mask,
        )
        for part in slice_prompts(before >= 0.5, before, settings, scale)
    ]


def follows(mask: np.ndarray, before: np.ndarray, least: float) -> bool:
    """Whether a component's mask (i, j) overlaps, by Dice, with the components that it grew from."""
    components, _ = ndimage.label(before, EIGHT_NEIGHBOURS)
    origin = np.isin(components, np.unique(components[mask & before]))
    total = mask.sum() + origin.sum()
    return bool(total) and 2 * (mask & origin).sum() / total >= least


def agree(one: np.ndarray, other: np.ndarray, least: float) -> bool:
    """Whether two masks (i, j) are, by Dice, the same; two empty ones are."""
    total = int(one.sum()) + int(other.sum())
    return not total or 2 * int((one & other).sum()) / total >= least


def components_containing(components: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """The components (i, j) of a labelled image that have a pixel in ``hit``, as bool."""
    numbers = np.unique(components[hit])
    return np.isin(components, numbers[numbers > 0])


def propagation_ranges(seeds: list[int], extent: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """(start, step, last slice) away from every clicked slice, at most to the next one, within ``extent``."""
    for n, k in enumerate(seeds):
        if extent[0] <= k <= extent[1]:
            yield k, 1, min(extent[1], seeds[n + 1] - 1 if n + 1 < len(seeds) else extent[1])
            yield k, -1, max(extent[0], seeds[n - 1] + 1 if n else extent[0])
