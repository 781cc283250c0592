"""Smooth random fields on slices."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

UNIT = 1.3  # interpolation between independent values lowers their variance


def smooth_field(noise: Tensor, size: int) -> Tensor:
    """White noise on a coarse grid, interpolated to a smooth field.

    Args:
        noise: (n, cells, cells), standard normal.
        size: Edge of the fields in pixels.

    Returns:
        (n, size, size) with about unit variance, ``cells`` bumps across.
    """
    return F.interpolate(noise[:, None], (size, size), mode="bicubic", align_corners=False)[:, 0] * UNIT
