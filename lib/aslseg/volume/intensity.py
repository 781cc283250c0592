"""From stored intensities to 0..1: a fixed HU window for CT, percentiles of the scan for MR."""

from __future__ import annotations

import numpy as np

from aslseg.settings import Settings


def window_of(array: np.ndarray, settings: Settings) -> tuple[float, float]:
    """The stored intensities that become 0 and 1.

    For CT ``window_low..window_high`` HU. For MR the 0.5th to the 99.5th percentile of the scan's non-zero voxels
    (background zeros would hide the tissue).
    """
    if settings.modality == "ct":
        return settings.window_low, settings.window_high
    inside = array[array != 0][:: max(1, array.size // 2_000_000)]
    low, high = np.percentile(inside, [0.5, 99.5]) if inside.size else (0.0, 1.0)
    return float(low), float(high)


def windowed(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Stored intensities (any shape) to float32 in 0..1, clipped."""
    low, high = window
    values = array.astype(np.float32, copy=False)
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1, dtype=np.float32)


def normalise(array: np.ndarray, settings: Settings) -> np.ndarray:
    """Stored intensities of a whole scan (any shape) to float32 in 0..1, see :func:`window_of`."""
    return windowed(array, window_of(array, settings))
