"""From stored intensities to 0..1: a fixed HU window for CT, percentiles of the scan for MR."""

from __future__ import annotations

import numpy as np

from aslseg.settings import Settings


def normalise(array: np.ndarray, settings: Settings) -> np.ndarray:
    """Stored intensities (any shape) to float32 in 0..1.

    CT is clipped to ``window_low..window_high`` HU. MR runs from the 0.5th to the 99.5th percentile of the
    scan's non-zero voxels (background zeros would hide the tissue).
    """
    values = array.astype(np.float32, copy=False)
    if settings.modality == "ct":
        low, high = settings.window_low, settings.window_high
    else:
        inside = values[values != 0][:: max(1, values.size // 2_000_000)]
        low, high = np.percentile(inside, [0.5, 99.5]) if inside.size else (0.0, 1.0)
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1, dtype=np.float32)
