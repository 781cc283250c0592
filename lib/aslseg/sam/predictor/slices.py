"""The slices of a scan as SAM is shown them: windowed, each with a name for its embedding."""

from __future__ import annotations

import numpy as np

from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embeddings import slice_name
from aslseg.sam.predictor.zoom import Crop, full_crop
from aslseg.volume.intensity import windowed


class SliceSource:
    """Slices along the last axis of a volume, windowed when they are asked for.

    Args:
        volume: (i, j, k) stored intensities; a view of any memory layout.
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
    def full_crop(self) -> Crop:
        """The crop that is a whole slice."""
        return full_crop(self.shape[:2])

    def name(self, k: int, model: SAMModel, crop: Crop | None = None) -> str:
        """:func:`aslseg.sam.predictor.embeddings.slice_name` of a slice or of a part of it."""
        crop = crop or self.full_crop
        key = (model.fingerprint, k, crop)
        if key not in self._names:
            self._names[key] = slice_name(model, self.slice(k)[crop.index])
        return self._names[key]
