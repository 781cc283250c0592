"""Losses of the SSL methods, with weights for every voxel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5


def segmentation_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Half cross-entropy, half Dice (science.md §1.2, l_sup; the form of the UA-MT lineage).

    Dice = 1 - (2 sum(w p y) + e) / (sum(w p^2) + sum(w y) + e), summed over the batch, averaged over the
    foreground classes.

    Args:
        logits: (B, C, i, j, k).
        target: (B, i, j, k) int64 class map.
        weight: (B, i, j, k) voxel weights >= 0; None for 1 everywhere. All-zero weights give a loss of 0.
    """
    logits = logits.float()
    entropy = F.cross_entropy(logits, target, reduction="none")
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)[:, 1:]
    p = logits.softmax(1)[:, 1:]
    if weight is None:
        ce = entropy.mean()
        w: Tensor | float = 1.0
    else:
        ce = (entropy * weight).sum() / weight.sum().clamp_min(EPSILON)
        w = weight[:, None]
    axes = (0, 2, 3, 4)
    overlap, size = (w * p * truth).sum(axes), (w * p * p).sum(axes) + (w * truth).sum(axes)
    dice = 1 - (2 * overlap + EPSILON) / (size + EPSILON)
    return 0.5 * (ce + dice.mean())


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the softmax outputs (B, C, ...); no gradient reaches the teacher."""
    return (student_logits.float().softmax(1) - teacher_logits.detach().float().softmax(1)).square().mean()


def foreground_fraction(logits: Tensor) -> Tensor:
    """Part of the voxels whose largest logit is not the background's, to notice collapse (science.md §6.3 d)."""
    return (logits.detach().argmax(1) > 0).float().mean()


def clipped_noise(like: Tensor, generator: torch.Generator, sigma: float = 0.1, limit: float = 0.2) -> Tensor:
    """Gaussian input noise of the Mean Teacher, clipped (science.md §4: eta = clip(0.1 e, +-0.2))."""
    noise = torch.randn(like.shape, generator=generator, device=generator.device)
    return (sigma * noise).clamp(-limit, limit).to(like.device)
