"""A scan as SAM is shown it: slice by slice, windowed, each with a name for its embedding."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embeddings import slice_name
from aslseg.sam.predictor.zoom import Crop, whole
from aslseg.volume.intensity import windowed


class SliceSource:
    """Slices along the last axis of a volume, made when they are looked at.

    Args:
        volume: (i, j, k) stored intensities; a view of whatever layout.
        window: Intensities that become 0 and 1.
    """

    def __init__(self, volume: np.ndarray, window: tuple[float, float] = (0.0, 1.0)) -> None:
        self.volume, self.window = volume, window
        self.shape: tuple[int, int, int] = (volume.shape[0], volume.shape[1], volume.shape[2])
        self._names: dict[tuple[str, int, Crop], str] = {}

    def slice(self, k: int) -> np.ndarray:
        """(i, j) float32 in 0..1."""
        return windowed(np.ascontiguousarray(self.volume[..., k]), self.window)

    @property
    def whole(self) -> Crop:
        """All of a slice."""
        return whole(self.shape[:2])

    def name(self, k: int, model: SAMModel, view: Crop | None = None) -> str:
        """As :func:`aslseg.sam.predictor.embeddings.slice_name`, of all of a slice or of a part of it."""
        view = view or self.whole
        key = (model.fingerprint, k, view)
        if key not in self._names:
            self._names[key] = slice_name(model, self.slice(k)[view.index])
        return self._names[key]


class Region:
    """Probabilities of one object on another grid of the same box, brought to a picture's slices when needed.

    Args:
        array: (a, b, c) probabilities or bool; axes in the picture's order, covering the same space.
        shape: Of the picture, (i, j, k).
    """

    def __init__(self, array: np.ndarray, shape: tuple[int, int, int]) -> None:
        self.array, self.shape = array, shape

    def slice(self, k: int) -> np.ndarray:
        """(i, j) float32 in 0..1, trilinear."""
        if self.array.shape == self.shape:
            return np.asarray(self.array[..., k], np.float32)
        count = self.array.shape[2]
        at = min(max((k + 0.5) * count / self.shape[2] - 0.5, 0), count - 1)
        low = int(at)
        high, part = min(low + 1, count - 1), np.float32(at - low)
        between = (1 - part) * self.array[..., low].astype(np.float32) + part * self.array[..., high]
        flat = torch.from_numpy(np.ascontiguousarray(between, np.float32))[None, None]
        return F.interpolate(flat, self.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
