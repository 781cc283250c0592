"""Augmentation of training slices: other shapes and other scanners, since a few labelled scans are few patients."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aslseg.sam.training.generated_slices import field

ROTATION, SCALE, SHIFT = math.radians(20), 0.25, 0.1  # the shift as a fraction of half an edge
BEND, BUMPS = 0.24, (3, 7)  # elastic: by up to BEND / bumps of half an edge, with so many bumps across
GAMMA, CONTRAST, BRIGHTNESS = 0.4, 0.2, 0.1
BIAS, BIASED = 0.25, 0.3  # here and below: the amount, and the fraction of the slices
NOISE, NOISY = 0.05, 0.3
BLURRED = 0.2


def augmented(
    image: np.ndarray, maps: np.ndarray, rng: np.random.Generator, flips: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Transform a slice as if it were of another patient and from another scanner, and maps on it alike.

    Both are rotated, scaled, shifted and bent, and flipped where that is allowed; the slice also gets another gamma,
    contrast and brightness, and sometimes a bias field, noise or blur. A warp that moves an object out of the slice is
    not applied.

    Args:
        image: (i, j) in 0..1.
        maps: (2, n, i, j) in 0..1, objects first.
        rng: Source of all random numbers.
        flips: Flip along i and j, each with probability 0.5.

    Returns:
        Image (i, j) and maps (2, n, i, j), float32 in 0..1.
    """
    stack = torch.from_numpy(np.concatenate([image[None], maps.reshape(-1, *image.shape)]).astype(np.float32))
    stack = stack.flip([axis for axis in (1, 2) if flips and rng.random() < 0.5])
    warped = F.grid_sample(stack[None], _grid(image.shape, rng), align_corners=False)[0].clamp(0, 1)
    objects = slice(1, 1 + maps.shape[1])
    if (warped[objects] > 0.5).flatten(1).any(1).all():
        stack = warped
    return _rescanned(stack[0].numpy(), rng), stack[1:].numpy().reshape(maps.shape)


def _grid(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """The positions of the pixels of a new slice (i, j) in the old one, (1, i, j, 2) as for ``grid_sample``."""
    turn, scale, ratio = rng.uniform(-ROTATION, ROTATION), rng.uniform(1 - SCALE, 1 + SCALE), shape[0] / shape[1]
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    move = rng.uniform(-SHIFT, SHIFT, 2)
    theta = torch.tensor([[[cos, -sin * ratio, move[0]], [sin / ratio, cos, move[1]]]], dtype=torch.float32)
    bumps = rng.uniform(*BUMPS)
    bent = np.stack([_field(shape, bumps, rng) for _ in range(2)], -1) * np.float32(rng.uniform(0, BEND) / bumps)
    return F.affine_grid(theta, [1, 1, *shape], align_corners=False) + torch.from_numpy(bent)


def _rescanned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change the intensities of a slice (i, j) within 0..1."""
    image = image ** math.exp(rng.uniform(-GAMMA, GAMMA)) * rng.uniform(1 - CONTRAST, 1 + CONTRAST)
    image = image + rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    if rng.random() < BIASED:
        image = image * np.exp(rng.uniform(0, BIAS) * _field(image.shape, 1.5, rng))
    if rng.random() < NOISY:
        image = image + rng.uniform(0, NOISE) * rng.standard_normal(image.shape)
    if rng.random() < BLURRED:
        padded = F.pad(torch.from_numpy(image.astype(np.float32))[None, None], (1, 1, 1, 1), mode="replicate")
        image = F.avg_pool2d(padded, 3, 1)[0, 0].numpy()
    return np.clip(image, 0, 1).astype(np.float32)


def _field(shape: tuple[int, ...], bumps: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth random field (i, j) of about unit variance, ``bumps`` across its long side."""
    return field(rng, max(shape), bumps)[: shape[0], : shape[1]]
