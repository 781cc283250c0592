"""Where an object may lie: inside the object around it, and not on what is finished beside it."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from aslseg.sam.clicks.automatic_mask import AutomaticMask

MAX_PARENT_FRACTION = 0.8  # of its parent on a slice: a nested object that takes up more is not plausible
MAX_SLICE_FRACTION = 0.1  # of the slice


class AllowedRegion:
    """The pixels of each slice that an object may have.

    Args:
        parent: The object around it, or None. Its holes count as inside: automatic masks of an organ leave out lesions.
        finished: Other objects that nothing is drawn over, bool (i, j, k) on the grid of the slices, or None.
        kept: Objects of the same label, alike: nothing is drawn over them either, but they are shown.
    """

    def __init__(
        self,
        parent: AutomaticMask | None = None,
        finished: np.ndarray | None = None,
        kept: np.ndarray | None = None,
    ) -> None:
        self.parent, self.finished, self.kept = parent, finished, kept
        self._last: tuple[int, np.ndarray | None] | None = None

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        arrays = self.finished, self.kept, None if self.parent is None else self.parent.array
        return sum(a.nbytes for a in arrays if a is not None)

    def slice(self, k: int) -> np.ndarray | None:
        """Allowed pixels (i, j), bool; None where all are."""
        last = self._last
        if last is None or last[0] != k:
            last = self._last = (k, self._slice(k))
        return last[1]

    def _slice(self, k: int) -> np.ndarray | None:
        allowed = None
        if self.parent is not None:
            mask = self.parent.mask(k)
            allowed = np.zeros(self.parent.shape[:2], bool) if mask is None else ndimage.binary_fill_holes(mask)
        for taken in (self.finished, self.kept):
            if taken is not None and taken[..., k].any():
                allowed = ~taken[..., k] if allowed is None else allowed & ~taken[..., k]
        return allowed

    def plausible_area(self, k: int, shape: tuple[int, int]) -> int:
        """The largest number of pixels that a nested object plausibly has on slice k of a shape (i, j)."""
        most, allowed = MAX_SLICE_FRACTION * shape[0] * shape[1], self.slice(k)
        if self.parent is not None and allowed is not None:
            most = min(most, MAX_PARENT_FRACTION * allowed.sum())
        return int(most)

    def cut(self, k: int, drawn: np.ndarray) -> np.ndarray:
        """Probabilities or a mask (i, j) on slice k, 0 where nothing is allowed; the array itself where all is."""
        allowed = self.slice(k)
        return drawn if allowed is None else np.where(allowed, drawn, drawn.dtype.type(0))

    def without_finished(self, k: int, mask: np.ndarray) -> np.ndarray:
        """A mask (i, j), bool, on slice k without the finished objects; the parent does not count."""
        return mask if self.finished is None else mask & ~self.finished[..., k]

    def holds(self, voxels: np.ndarray) -> np.ndarray:
        """Whether each of some voxels (n, 3) is allowed, (n,) bool."""
        slices = [self.slice(int(k)) for k in voxels[:, 2]]
        return np.array([a is None or a[i, j] for a, (i, j, _) in zip(slices, voxels, strict=True)], bool)
