"""Generated slices, to pre-train a SAM without scans or downloads.

Organs, blobs, polygons and vessels, nested, touching and hiding one another, in textures of either contrast sign,
under the blur, noise, bias and windowing of CT and MR.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aslseg.compute.random_field import smooth_field

MIN_PIXELS = 12  # of an object, before the slice is resized


def field(rng: np.random.Generator, size: int, cells: float) -> np.ndarray:
    """A smooth random field (size, size) with about unit variance and ``cells`` bumps across."""
    n = max(3, round(cells) + 2)
    return smooth_field(torch.from_numpy(rng.standard_normal((1, n, n), np.float32)), size)[0].numpy()


def outline(rng: np.random.Generator, size: int, radius: float, centre: np.ndarray) -> np.ndarray:
    """One filled shape (size, size) bool: ellipse, polygon, star-like blob or organ with a rough border."""
    i, j = np.ogrid[:size, :size]
    y, x = i - centre[0], j - centre[1]
    turn = rng.uniform(0, np.pi)
    squeeze = rng.uniform(0.35, 1)
    u = (np.cos(turn) * x + np.sin(turn) * y) / radius
    v = (-np.sin(turn) * x + np.cos(turn) * y) / (radius * squeeze)
    distance = np.hypot(u, v)
    kind = rng.integers(4)
    if kind == 0:
        return distance < 1
    if kind == 1:
        corners = int(rng.integers(3, 8))
        step = 2 * np.pi / corners
        return distance * np.cos(np.mod(np.arctan2(v, u), step) - step / 2) < np.cos(step / 2)
    if kind == 2:
        angle = np.arctan2(v, u)
        waves = sum(
            rng.uniform(0, 0.3 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, int(rng.integers(4, 8)))
        )
        return distance < 1 + waves
    return distance + rng.uniform(0.1, 0.35) * field(rng, size, size / radius * rng.uniform(0.8, 2)) < 1


def vessels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Random-walk tubes, bool (size, size)."""
    drawn = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(1, 5))):
        steps = int(rng.integers(20, 70))
        turn = np.cumsum(rng.normal(0, 0.25, steps)) + rng.uniform(0, 6.3)
        path = rng.uniform(0, size, 2) + np.cumsum(np.stack([np.sin(turn), np.cos(turn)], 1), 0)
        inside = np.round(path[((path >= 0) & (path < size - 1)).all(1)]).astype(int)
        drawn[inside[:, 0], inside[:, 1]] = 1
    width = int(rng.choice([1, 3, 3, 5]))
    return F.max_pool2d(torch.from_numpy(drawn)[None], width, 1, width // 2)[0].numpy() > 0


def _compose(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Intensities (size, size) before acquisition, and the objects in it."""
    image = np.full((size, size), rng.uniform(0, 1), np.float32)
    image += rng.uniform(0, 0.12) * field(rng, size, rng.uniform(2, 40))
    masks: list[np.ndarray] = []
    if rng.random() < 0.6:  # a body in air
        i, j = np.ogrid[:size, :size]
        body = np.hypot(i - size / 2, (j - size / 2) * rng.uniform(0.8, 1.2)) < size * 0.35
        body |= outline(rng, size, size * rng.uniform(0.4, 0.65), size * rng.uniform(0.4, 0.6, 2))
        image[~body] = rng.uniform(0, 0.15)
        masks.append(body)
    contrast = rng.choice([0.08, 0.15, 0.3, 0.6])
    for _ in range(int(rng.integers(3, 15))):
        nested = bool(masks) and rng.random() < 0.35
        parent = masks[int(rng.integers(len(masks)))] if nested else None
        radius = size * float(np.clip(rng.lognormal(-1.9, 0.65), 0.025, 0.42)) * (0.5 if nested else 1)
        centre = rng.uniform(0.1, 0.9, 2) * size
        if parent is not None and parent.any():
            inside = np.argwhere(parent)
            centre = inside[rng.integers(len(inside))].astype(float)
        shape = outline(rng, size, max(radius, 2.0), centre)
        shape &= parent if parent is not None else True
        if not nested:
            masks[1:] = [m & ~shape for m in masks[1:]]  # the new one lies in front of the others, and within the body
        level = image[shape].mean() if shape.any() else 0.0
        change = rng.choice([-1, 1]) * contrast * rng.uniform(0.35, 1.5)
        texture = rng.choice([0, 0.02, 0.05, 0.1]) * field(rng, size, rng.uniform(4, size / 2))
        flat = level if rng.random() < 0.7 else image
        image = np.where(shape, flat + change + texture, image)
        masks.append(shape)
    if rng.random() < 0.5:
        image = image + vessels(rng, size) * rng.choice([-1, 1]) * contrast * rng.uniform(0.3, 1)
    return image.astype(np.float32), masks


def _acquire(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Apply bias field, partial volume, noise and window to intensities (n, n), as a scanner and a viewer do."""
    size = image.shape[0]
    if rng.random() < 0.4:
        image = image * np.exp(rng.uniform(0.05, 0.35) * field(rng, size, 1.5))
    tensor = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
    for _ in range(int(rng.integers(0, 3))):
        tensor = F.avg_pool2d(F.pad(tensor, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.from_numpy(rng.standard_normal(tensor.shape, np.float32))
    if rng.random() < 0.6:
        noise = F.avg_pool2d(noise, 3, 1, 1) * 3
    image = (tensor + float(rng.choice([0.01, 0.02, 0.04, 0.08])) * rng.uniform(0.5, 1.2) * noise)[0, 0].numpy()
    low, high = np.percentile(image, [rng.uniform(0, 8), rng.uniform(92, 100)])
    image = np.clip((image - low) / max(high - low, 1e-3), 0, 1) ** rng.uniform(0.7, 1.4)
    return 1 - image if rng.random() < 0.15 else image


def generated_slice(rng: np.random.Generator, image_size: int, count: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A generated slice in SAM's input frame.

    It is drawn at a random resolution and enlarged, as slices of scans are.

    Args:
        rng: Source of all random numbers.
        image_size: Edge of the input frame.
        count: Number of targets; objects repeat where there are fewer.

    Returns:
        Image (image_size, image_size) float32 in 0..1; targets (count, image_size / 2, image_size / 2) in 0..1;
        the rows and columns that hold image, the rest being zero padding.
    """
    while True:
        size = int(rng.integers(image_size * 3 // 8, image_size + 1))
        drawn, masks = _compose(rng, size)
        masks = [m for m in masks if MIN_PIXELS <= m.sum() < 0.9 * m.size]
        if masks:
            break
    image = _resized(torch.from_numpy(_acquire(rng, drawn).astype(np.float32))[None], image_size)[0]
    rows, columns = image_size, image_size
    if rng.random() < 0.5:  # not square: padding at the bottom or on the right
        short = int(rng.uniform(0.6, 1) * image_size)
        rows, columns = (short, image_size) if rng.random() < 0.5 else (image_size, short)
    chosen = rng.choice(len(masks), count, replace=len(masks) < count)
    full = _resized(torch.from_numpy(np.stack([masks[n] for n in chosen]).astype(np.float32)), image_size)
    cut = full.clone()
    cut[:, rows:] = 0
    cut[:, :, columns:] = 0
    targets = F.avg_pool2d(cut, 2)
    for n in range(count):  # an object in the padding is replaced by another one
        if (targets[n] > 0.5).sum() < 4:
            alive = [m for m in range(count) if (targets[m] > 0.5).sum() >= 4]
            if not alive:
                return generated_slice(rng, image_size, count)
            targets[n] = targets[alive[int(rng.integers(len(alive)))]]
    image[rows:] = 0
    image[:, columns:] = 0
    return image, targets, (rows, columns)


def _resized(stack: Tensor, size: int) -> Tensor:
    return F.interpolate(stack[None], (size, size), mode="bilinear", align_corners=False, antialias=True)[0]
