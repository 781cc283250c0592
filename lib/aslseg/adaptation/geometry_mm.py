"""Distances, random fields and boxes in millimetres, on masks (i, j, k)."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation
from scipy import ndimage

from aslseg.compute.bounding_box import bounding_box

Spacing = tuple[float, float, float]
Box = tuple[slice, slice, slice]

FAR = 1e4
"""Distance in mm that stands for a missing border."""


def signed_distance(mask: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Distance to the mask's border in mm, negative inside; (i, j, k) float32.

    The border lies half the finest voxel edge outside the outermost voxel centres. Without a border (empty or full
    mask) the distance is +-10 m.
    """
    if not mask.any() or mask.all():
        return np.full(mask.shape, -FAR if mask.any() else FAR, np.float32)
    phi = _distance_outside(mask, spacing) - _distance_outside(~mask, spacing)
    return phi - np.sign(phi) * np.float32(min(spacing) / 2)


def _distance_outside(mask: np.ndarray, spacing: Spacing) -> np.ndarray:
    # ITK's Maurer transform is exact and three times as fast as scipy's
    picture = sitk.GetImageFromArray(mask.view(np.uint8))
    picture.SetSpacing(tuple(float(s) for s in reversed(spacing)))
    transform = sitk.SignedMaurerDistanceMapImageFilter()
    transform.SetSquaredDistance(False)
    transform.SetUseImageSpacing(True)
    transform.SetNumberOfThreads(1)
    return np.maximum(sitk.GetArrayFromImage(transform.Execute(picture)), 0)


def random_field(shape: tuple[int, ...], spacing: Spacing, length: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian random field of unit variance and the given correlation length (mm); float32."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, [length / s for s in spacing], truncate=2.0)
    return smooth / max(float(smooth.std()), 1e-6)


def components(mask: np.ndarray, spacing: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """Component numbers (i, j, k) and the equivalent radius of each in mm, from number 1 on."""
    parts, count = ndimage.label(mask)
    volume = np.bincount(parts.ravel(), minlength=count + 1)[1:] * float(np.prod(spacing))
    return parts, np.cbrt(3 * volume / (4 * np.pi))


def box_of(mask: np.ndarray, margin: float, spacing: Spacing) -> Box:
    """Bounding box of a mask that is not empty, dilated by ``margin`` mm and clipped."""
    tight = bounding_box(mask)
    if tight is None:
        raise ValueError("expected a mask that is not empty; there is no box around nothing")
    extra = [int(np.ceil(margin / step)) for step in spacing]
    i, j, k = (slice(max(0, s.start - e), s.stop + e) for s, e in zip(tight, extra, strict=True))
    return i, j, k


def box_around(centre: np.ndarray, radius: float, shape: tuple[int, ...], spacing: Spacing) -> Box:
    """Box of half-width ``radius`` mm around a voxel."""
    half = np.ceil(radius / np.array(spacing)).astype(int)
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def offsets(box: Box, centre: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Vector from ``centre`` (voxel) to each voxel of the box, in mm; (3, i, j, k)."""
    axes = [(np.arange(s.start, s.stop) - c) * w for s, c, w in zip(box, centre, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def random_voxel(where: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """A random voxel of a mask, (3,), or None if it is empty."""
    flat = np.flatnonzero(where)
    return np.array(np.unravel_index(rng.choice(flat), where.shape)) if flat.size else None
