"""Random geometry and intensity changes for a batch of patches, on the batch's device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = math.radians(15)
SCALE = 0.15
CENTRE, SPREAD = 0.5, 0.25
# part of the patches without calibrated intensities that are darkened, and the least factor
DARKENED, DARKEST = 0.5, 0.3


def centre(image: Tensor) -> Tensor:
    """0..1 to roughly zero mean and unit variance, the networks' input range."""
    return (image - CENTRE) / SPREAD


def normal_noise(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal values of a shape, made where they are used.

    A GPU makes them from a generator of its own, seeded with the next number of the given one: a million values take
    the CPU longer than the GPU takes for the rest of a step.

    Args:
        shape: Of the result.
        generator: Source of randomness (CPU).
        device: Of the result.
    """
    if device.type == "cpu":
        return torch.randn(tuple(shape), generator=generator)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.randn(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)


def random_geometry(
    shape: torch.Size, generator: torch.Generator, flips: bool = False, device: torch.device | None = None
) -> Tensor:
    """Sampling grid (B, i, j, k, 3): in-plane rotation up to 15 degrees, scaling up to 15 %.

    Args:
        shape: (B, C, i, j, k).
        generator: Source of randomness (CPU).
        flips: Also flip along i and j, each with probability 0.5. Scans have canonical axes: for most anatomy a
            mirrored patient does not exist.
        device: Of the grid; None is the CPU.
    """
    batch, size = shape[0], shape[2:]
    u = torch.rand(batch, 5, generator=generator) * 2 - 1
    angle, scale = u[:, 0] * ROTATION, 1 + u[:, 1] * SCALE
    flip = torch.ones(batch, 2)
    if flips:
        flip = torch.where(torch.rand(batch, 2, generator=generator) < 0.5, -1.0, 1.0)
    cos, sin, ratio = torch.cos(angle) * scale, torch.sin(angle) * scale, size[0] / size[1]
    theta = torch.zeros(batch, 3, 4)
    # grid_sample orders coordinates from the last axis to the first: (k, j, i)
    theta[:, 0, 0] = 1 + u[:, 2] * SCALE
    theta[:, 1, 1], theta[:, 1, 2] = cos * flip[:, 1], -sin * ratio * flip[:, 1]
    theta[:, 2, 1], theta[:, 2, 2] = sin / ratio * flip[:, 0], cos * flip[:, 0]
    return F.affine_grid(theta.to(device), list(shape), align_corners=False)


def warp(tensor: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    """Resample (B, C, i, j, k); outside is 0."""
    return F.grid_sample(tensor, grid.to(tensor.device), mode=mode, align_corners=False)


def random_intensity(image: Tensor, generator: torch.Generator, calibrated: bool = True) -> Tensor:
    """Gamma, contrast, brightness and noise on images in 0..1 (B, 1, i, j, k).

    Args:
        image: Changed copies of it are returned.
        generator: Source of randomness (CPU).
        calibrated: Whether a tissue has the same intensity in every scan (CT). Otherwise half of the images are also
            darkened, down to 0.3: in MR a bright spot, such as fat beside the coil, takes the top of a scan's range,
            and pushes all else down.
    """
    if not calibrated:
        v = torch.rand(len(image), 2, generator=generator)
        factor = torch.where(v[:, 0] < DARKENED, 1 - (1 - DARKEST) * v[:, 1], 1.0)
        image = image * factor.to(image.device)[:, None, None, None, None]
    u = (torch.rand(len(image), 4, generator=generator) * 2 - 1).to(image.device)[:, :, None, None, None, None]
    image = image.clamp(0, 1) ** torch.exp(0.3 * u[:, 0])
    image = (image - 0.5) * (1 + 0.2 * u[:, 1]) + 0.5 + 0.08 * u[:, 2]
    noise = normal_noise(image.shape, generator, image.device)
    return image + 0.03 * (u[:, 3] + 1) / 2 * noise
