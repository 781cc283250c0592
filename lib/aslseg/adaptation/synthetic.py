"""Synthetic segmentation errors: true masks changed as an SSL network or SAM would get them wrong.

Every operator is a pure function ``(mask, image, spacing, rng, severity) -> mask``: mask (i, j, k) bool, image
(i, j, k) float32 in 0..1 or None, spacing in mm along i, j, k, severity 0..1. It returns a new mask and never fails on
an empty or a full one. Lengths are in millimetres and limited by the size of the object, because networks segment small
objects worse than large ones. With severity 0 an operator changes nothing.

The adaptation network learns to undo these errors (ASLseg, Chen et al., arXiv 2312.07969, stage III). The paper does
not list its operators; these are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from aslseg.adaptation.geometry_mm import (
    FAR,
    Spacing,
    box_around,
    box_of,
    components,
    offsets,
    random_field,
    random_voxel,
    signed_distance,
)
from aslseg.types import Labels

Operator = Callable[[np.ndarray, np.ndarray | None, Spacing, np.random.Generator, float], np.ndarray]

CONTEXT = 30.0
"""Millimetres around a region in which errors are made."""
MOST_COMPONENTS = 24
"""The largest components, which are treated one by one; a label with more consists mostly of specks."""
UNCHANGED_PROBABILITY = 0.07
"""How often :func:`corrupt_region` leaves a region as it is, so that good masks are learned to be left alone."""
EMPTY_PROBABILITY = 0.03
"""How often, at severity 0.5 and above, it removes the region altogether."""
LEAST_DRAWN = 0.3
"""Least severity of a training sample, as part of the largest."""
SHIFT_VOXELS, SHIFT_SCALE = 3, 0.15
"""Largest translation, in finest voxel edges, and largest relative change of size."""


class Error(NamedTuple):
    """An operator and how often :func:`corrupt` uses it at severity 0.5 and above."""

    apply: Operator
    probability: float


def miss(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """Missed lesions: a component of radius r goes with probability severity * exp(-r / 14 mm)."""
    parts, radii = components(mask, spacing)
    kept = rng.random(radii.size) >= severity * np.exp(-radii / 14)
    return np.concatenate([[False], kept])[parts]


def add_false_lesion(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """False lesions: one to three rough ellipsoids of the size of the true components, 5 to 40 mm away from these."""
    out = mask.copy()
    if severity <= 0:
        return out
    phi = signed_distance(mask, spacing)
    allowed = (phi >= 5) & ((phi <= 40) | (phi >= FAR))
    _, radii = components(mask, spacing)
    typical = float(np.clip(np.median(radii), 4, 16)) if radii.size else 8.0
    for _ in range(min(int(rng.geometric(0.6)), 3)):
        centre = random_voxel(allowed, rng)
        if centre is None:
            break
        radius = typical * rng.uniform(0.4, 0.5 + 0.7 * severity)
        box = box_around(centre, 1.6 * radius, mask.shape, spacing)
        stretched = offsets(box, centre, spacing) / (radius * rng.uniform(0.75, 1.3, 3))[:, None, None, None]
        form = (stretched**2).sum(0)
        out[box] |= form + 0.25 * random_field(form.shape, spacing, radius / 2, rng) <= 1
    return out


def add_similar_object(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """A plausible false object: a connected piece, near the true one or touching it, that is as bright.

    Without an image or without an object nothing changes.
    """
    out = mask.copy()
    if image is None or severity <= 0 or not mask.any():
        return out
    near = box_of(mask, CONTEXT, spacing)
    smooth = ndimage.gaussian_filter(image[near].astype(np.float32), 0.7)
    inside = smooth[mask[near]]
    middle = np.median(inside)
    alike = np.abs(smooth - middle) <= 1.5 * max(float(np.median(np.abs(inside - middle))), 0.01)
    alike &= ~mask[near]
    centre = random_voxel(alike, rng)
    if centre is None:
        return out
    size = np.cbrt(3 * mask.sum() * np.prod(spacing) / (4 * np.pi))
    radius = float(np.clip(size * rng.uniform(0.3, 0.4 + 0.6 * severity), 4, 25))
    box = box_around(centre, radius, alike.shape, spacing)
    ball = (offsets(box, centre, spacing) ** 2).sum(0) <= radius**2
    parts, _ = ndimage.label(alike[box] & ball)
    seed = tuple(c - s.start for c, s in zip(centre, box, strict=True))
    out[near][box] |= parts == parts[seed]
    return out


def offset_border(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """Each component too large or too small by one distance: phi <= b, b uniform in +-severity * min(6 mm, 0.6 r)."""
    parts, radii = components(mask, spacing)
    out = mask.copy()
    for number in np.argsort(-radii)[:MOST_COMPONENTS]:
        most = severity * min(6.0, 0.6 * radii[number])
        b = rng.uniform(-most, most)
        box = box_of(parts == number + 1, most + max(spacing), spacing)
        part = parts[box] == number + 1
        changed = signed_distance(part, spacing) <= b
        out[box] = (out[box] | changed) if b > 0 else out[box] & (changed | ~part)
    return out


def rough(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """A wavy border: phi + A g <= 0, g a Gaussian random field, A up to 4 mm but not over half the thickness."""
    out = mask.copy()
    if severity <= 0 or not mask.any() or mask.all():
        return out
    box = box_of(mask, 10, spacing)
    phi = signed_distance(mask[box], spacing)
    amplitude = min(rng.uniform(0.5, 4), 0.5 * float(-phi.min())) * severity
    field = random_field(phi.shape, spacing, rng.uniform(2, 6), rng)
    out[box] = phi + amplitude * field <= 0
    return out


def cut(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """A component found only partly: up to 60 % of it missing, behind a plane, within a ball, or as holes."""
    out = mask.copy()
    parts, radii = components(mask, spacing)
    if severity <= 0 or not radii.size:
        return out
    chosen = rng.choice(radii.size, p=radii**2 / (radii**2).sum()) + 1
    box = box_of(parts == chosen, 0, spacing)
    part = parts[box] == chosen
    voxels = np.argwhere(part) * np.array(spacing)
    lost = np.zeros(len(voxels), bool)
    kind = rng.integers(3)
    for _ in range(int(rng.integers(1, 4)) if kind == 2 else 1):
        fraction = rng.uniform(0.03, 0.12) if kind == 2 else rng.uniform(0.1, 0.6)
        if kind == 0:
            score = voxels @ rng.standard_normal(3)
        else:
            score = np.linalg.norm(voxels - voxels[rng.integers(len(voxels))], axis=1)
        lost |= score < np.quantile(score, fraction * severity)
    part[part] = lost
    out[box] &= ~part
    return out


def merge(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """Neighbouring components merged: closing with a radius of up to 6 mm."""
    out = mask.copy()
    if severity <= 0 or not mask.any() or mask.all():
        return out
    radius = severity * rng.uniform(2, 6)
    box = box_of(mask, 2 * radius + max(spacing), spacing)
    grown = signed_distance(mask[box], spacing) <= radius
    out[box] |= signed_distance(grown, spacing) <= -radius
    return out


def leak(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """The mask leaks over its border where the neighbour is as bright; without an image nothing changes."""
    out = mask.copy()
    steps = int(np.ceil(6 * severity))
    surface = mask & ~ndimage.binary_erosion(mask, border_value=1)
    centre = random_voxel(surface, rng)
    if image is None or centre is None or steps == 0:
        return out
    radius = rng.uniform(8, 20)
    box = box_around(centre, radius, mask.shape, spacing)
    ball = (offsets(box, centre, spacing) ** 2).sum(0) <= radius**2
    values = np.asarray(image[box], np.float32)
    alike = np.abs(values - values[mask[box] & ball].mean()) <= 0.08
    out[box] |= ndimage.binary_dilation(mask[box], iterations=steps, mask=ball & (alike | mask[box]))
    return out


def shift(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """Moved by up to three of the finest voxel edges along each axis and scaled by up to 15 %."""
    out = np.zeros_like(mask)
    if severity <= 0 or not mask.any() or mask.all():
        return mask.copy()
    _, radii = components(mask, spacing)
    most = min(SHIFT_VOXELS * min(spacing), 0.5 * float(radii.max()))
    # room for what moves: scaling moves no voxel by more than this share of the object's extent
    extent = max((s.stop - s.start) * w for s, w in zip(box_of(mask, 0, spacing), spacing, strict=True))
    box = box_of(mask, most + SHIFT_SCALE * extent + max(spacing), spacing)
    part = mask[box].astype(np.float32)
    move = rng.uniform(-1, 1, 3) * severity * most / np.array(spacing)
    scale = 1 + rng.uniform(-SHIFT_SCALE, SHIFT_SCALE, 3) * severity
    centre = np.argwhere(part).mean(0)
    moved = ndimage.affine_transform(part, 1 / scale, centre - (centre + move) / scale, order=1, mode="nearest")
    out[box] = moved >= 0.5
    return out


def drop_slices(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """Slices (axis k) that do not fit their neighbours: emptied, copied from below, or both end slices missing."""
    out = mask.copy()
    found = np.flatnonzero(mask.any(axis=(0, 1)))
    if found.size < 3:
        return out
    chance = rng.random(found.size)
    for k in found[chance < 0.1 * severity]:
        out[:, :, k] = False
    for k in found[1:][chance[1:] > 1 - 0.1 * severity]:
        out[:, :, k] = mask[:, :, k - 1]
    if rng.random() < 0.5 * severity:
        out[:, :, [found[0], found[-1]]] = False
    return out


# the order is that in which errors arise: which objects are found, how far they reach, where the border runs
OPERATORS = (
    Error(miss, 1.0),
    Error(add_false_lesion, 0.5),
    Error(add_similar_object, 0.4),
    Error(merge, 0.15),
    Error(leak, 0.2),
    Error(shift, 0.35),
    Error(offset_border, 0.8),
    Error(cut, 0.4),
    Error(rough, 0.8),
    Error(drop_slices, 0.2),
)


def soften(mask: np.ndarray, spacing: Spacing, rng: np.random.Generator) -> np.ndarray:
    """A mask as a network's probabilities, (i, j, k) float32 in 0..1, 0 far from it. See :func:`soft_pair`."""
    return soft_pair(mask, spacing, rng, 0.0)[0]


def soft_pair(
    mask: np.ndarray, spacing: Spacing, rng: np.random.Generator, difference: float
) -> tuple[np.ndarray, np.ndarray]:
    """One faulty mask as the SSL model and as SAM would give it: sigmoid((w + b - phi) / tau + n) each.

    w is a smooth field that moves the border by a fraction of a voxel, n is weak white noise; both act on the logit,
    because networks are uncertain near borders and not far from them. tau is 0.3 to 2 of the finest voxel edges.

    Args:
        mask: (i, j, k) bool.
        spacing: mm.
        rng: Draws w, b, tau and n, for both.
        difference: mm; in the second w grows to this standard deviation, and b is uniform in plus or minus it.

    Returns:
        Two (i, j, k) float32 arrays.
    """
    first, second = np.zeros((2, *mask.shape), np.float32)
    if not mask.any():
        return first, second
    voxel = min(spacing)
    box = box_of(mask, 16 * voxel + 2 * difference, spacing)
    phi = signed_distance(mask[box], spacing)
    thickness = max(float(-phi.min()), voxel)
    for out, extra in ((first, 0.0), (second, min(difference, thickness / 2))):
        sigma = max(rng.uniform(0, 0.4) * voxel, extra)
        moved = sigma * random_field(phi.shape, spacing, 3 * voxel, rng) + rng.uniform(-extra, extra) - phi
        logit = moved / (rng.uniform(0.3, 2) * voxel) + 0.15 * rng.standard_normal(phi.shape, dtype=np.float32)
        out[box] = 1 / (1 + np.exp(-np.clip(logit, -20, 20)))
    return first, second


def corrupt_region(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    """One region with one draw of errors, one more on top of it for each 1 of severity; see :func:`corrupt`."""
    out = _corrupt_once(mask, image, spacing, rng, min(severity, 1.0))
    return out if severity <= 1 else corrupt_region(out, image, spacing, rng, severity - 1)


def _corrupt_once(
    mask: np.ndarray, image: np.ndarray | None, spacing: Spacing, rng: np.random.Generator, severity: float
) -> np.ndarray:
    often = min(1.0, 2 * severity)
    chance = rng.random()
    if chance < UNCHANGED_PROBABILITY:
        return mask.copy()
    if chance > 1 - EMPTY_PROBABILITY * often:
        return np.zeros_like(mask)
    out = mask.copy()
    box = box_of(mask, CONTEXT, spacing) if mask.any() else (slice(None),) * 3
    part, view = out[box], None if image is None else image[box]
    for error in OPERATORS:
        if rng.random() < error.probability * often:
            part = error.apply(part, view, spacing, rng, severity)
    out[box] = part
    return out


def corrupt(
    regions: np.ndarray,
    image: np.ndarray | None,
    labels: Labels,
    spacing: Spacing,
    rng: np.random.Generator,
    severity: float | Sequence[float] | np.ndarray,
) -> np.ndarray:
    """True regions with errors, as a network would have drawn them.

    Each region gets its own errors. Where a nested region leaves its parent, the parent is enlarged, because in the SSL
    network's softmax a region's probability is never below that of the labels nested in it.

    Args:
        regions: (R, i, j, k) bool, the truth.
        image: (i, j, k) float32 in 0..1; None leaves out the errors that follow the image.
        labels: Names and nesting of the R regions.
        spacing: mm.
        rng: All randomness.
        severity: Of all regions or of each: 0 (nothing changes) to 1, or more for masks that errors are added to again;
            :func:`draw_severity` gives what training uses.

    Returns:
        (R, i, j, k) bool.
    """
    each = np.broadcast_to(severity, len(regions)).tolist()
    out = np.stack([corrupt_region(mask, image, spacing, rng, s) for mask, s in zip(regions, each, strict=True)])
    for child in reversed(range(len(labels))):
        parent = labels.parents[child]
        if parent is not None:
            out[parent] |= out[child]
    return out


def draw_severity(rng: np.random.Generator, most: float = 1.0) -> float:
    """Severity of one training sample, uniform in 0.3..1 times ``most``."""
    return float(most * rng.uniform(LEAST_DRAWN, 1))
