"""The automatic mask of the object that is clicked on, brought to the slices of the scan."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


class AutomaticMask:
    """Probabilities of one object, resampled slice by slice as they are asked for.

    Args:
        array: (a, b, c) probabilities or bool, on any grid that covers the same space with its axes in the same order.
        shape: (i, j, k) of the volume whose slices are asked for.
    """

    def __init__(self, array: np.ndarray, shape: tuple[int, int, int]) -> None:
        self.array, self.shape = array, shape
        self._packed: dict[int, np.ndarray | None] = {}

    def slice(self, k: int) -> np.ndarray:
        """Probabilities (i, j) float32 in 0..1, interpolated trilinearly."""
        if self.array.shape == self.shape:
            return np.asarray(self.array[..., k], np.float32)
        count = self.array.shape[2]
        at = min(max((k + 0.5) * count / self.shape[2] - 0.5, 0), count - 1)
        low = int(at)
        high, weight = min(low + 1, count - 1), np.float32(at - low)
        between = (1 - weight) * self.array[..., low].astype(np.float32) + weight * self.array[..., high]
        flat = torch.from_numpy(np.ascontiguousarray(between, np.float32))[None, None]
        return F.interpolate(flat, self.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()

    def probability(self, k: int) -> np.ndarray | None:
        """Probabilities (i, j) float32, or None where none of them reaches 0.5."""
        found = self.slice(k)
        return found if (found >= 0.5).any() else None

    def mask(self, k: int) -> np.ndarray | None:
        """The mask (i, j), bool, or None where it is empty.

        Every reply shows it on many slices, so that it is kept, one bit a pixel.
        """
        if k not in self._packed:
            found = self.probability(k)
            self._packed[k] = None if found is None else np.packbits(found >= 0.5)
        packed = self._packed[k]
        shape = self.shape[:2]
        return None if packed is None else np.unpackbits(packed, count=shape[0] * shape[1]).view(bool).reshape(shape)
