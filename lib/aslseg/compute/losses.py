"""Losses of the SSL methods, with weights for every voxel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aslseg.compute.augment import normal_noise
from aslseg.types import Labels

EPSILON = 1e-5


def segmentation_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Half cross-entropy, half Dice (docs/science.md §1.2, l_sup; the form of the UA-MT lineage).

    Dice = 1 - (2 sum(w p y) + e) / (sum(w p^2) + sum(w y) + e), summed over the batch, averaged over the
    foreground classes.

    Args:
        logits: (B, C, i, j, k).
        target: (B, i, j, k) int64 class map.
        weight: (B, i, j, k) voxel weights >= 0; None for 1 everywhere. All-zero weights give a loss of 0.
    """
    logits = logits.float()
    entropy = F.cross_entropy(logits, target, reduction="none")
    return 0.5 * (weighted_mean(entropy, weight) + dice_loss(logits.softmax(1), target, weight))


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """sum(w v) / sum(w) over all voxels; 0 where all weights are."""
    if weight is None:
        return values.mean()
    return (values * weight).sum() / weight.sum().clamp_min(EPSILON)


def dice_loss(
    p: Tensor, target: Tensor, weight: Tensor | None = None, *, squared: bool = True, epsilon: float = EPSILON
) -> Tensor:
    """1 - (2 sum(w p y) + e) / (sum(w p^2) + sum(w y) + e), summed over the batch, averaged over foreground classes.

    Averaged are the classes that the batch holds, all where it holds none: the term of a class that is not there is
    1 whatever the network says of it.

    Args:
        p: Probabilities (B, C, i, j, k).
        target: (B, i, j, k) int64 class map.
        weight: (B, i, j, k) voxel weights >= 0; None for 1 everywhere.
        squared: p^2 in the denominator (V-Net, UA-MT, DTC); else p (MC-Net).
        epsilon: e.
    """
    w = 1.0 if weight is None else weight[:, None]
    truth = _one_hot(target, p)[:, 1:]
    overlap, size = _overlap_and_size(p[:, 1:], truth, w, squared, (0, 2, 3, 4))
    present = (w * truth).sum((0, 2, 3, 4)) > 0
    losses = 1 - (2 * overlap + epsilon) / (size + epsilon)
    return weighted_mean(losses, torch.where(present.any(), present, ~present).to(losses.dtype))


def region_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Half cross-entropy, half Dice over one region of copy-pasted patches (BCP; docs/science.md §4).

    The region is where the weight is not 0. CE = sum(w ce) / sum(w), so that a small region counts as much as a large
    one. Dice = 1 - (2 sum(w p y) + e) / (sum(w p) + sum(w y) + e) of every patch and class, background included,
    averaged over classes and, by their summed weights, over patches.

    Args:
        logits: (B, C, i, j, k).
        target: (B, i, j, k) int64 class map.
        weight: (B, i, j, k) voxel weights >= 0; all 0 gives a loss of 0.
    """
    logits = logits.float()
    ce = weighted_mean(F.cross_entropy(logits, target, reduction="none"), weight)
    p = logits.softmax(1)
    overlap, size = _overlap_and_size(p, _one_hot(target, p), weight[:, None], False, (2, 3, 4))
    dice = (1 - (2 * overlap + EPSILON) / (size + EPSILON)).mean(1)
    return 0.5 * (ce + weighted_mean(dice, weight.sum((1, 2, 3))))


IMPOSSIBLE = -1e4
"""Logit whose probability is 0."""


def merge_unknown(logits: Tensor, target: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Logits and target of voxels of which only the outer label is known (:meth:`aslseg.types.Labels.mark_unknown`).

    There the outer label n has the probability of all classes that it may be, z_n = log sum_(c in n) exp z_c, and the
    classes nested in it have none. So cross-entropy is -log of that sum, and a Dice of the outer label takes it as a
    whole, while no loss says anything of the classes within.

    Args:
        logits: (B, 1 + N, i, j, k).
        target: (B, i, j, k) int64; values above N are "label n or anything nested in it".
        labels: The N labels.

    Returns:
        Logits (float32 where anything is merged) and a target with values 0..N.
    """
    if not bool((target > len(labels)).any()):
        return logits, target
    logits = logits.float()
    channels = list(logits.unbind(1))
    for outer in sorted({parent for parent in labels.parents if parent is not None}):
        here, members = target == len(labels) + 1 + outer, labels.members(outer)
        whole = logits[:, members].logsumexp(1)
        for value in members:
            channels[value] = torch.where(here, whole if value == outer + 1 else IMPOSSIBLE, channels[value])
        target = torch.where(here, outer + 1, target)
    return torch.stack(channels, 1), target


def classes_known(target: Tensor, labels: Labels) -> Tensor:
    """Whether a patch says which voxels are a class's: no voxel may be of it as well as of another, (B, N) bool.

    Args:
        target: (B, i, j, k) as for :func:`merge_unknown`.
        labels: The N labels.
    """
    known = torch.ones(len(target), len(labels), dtype=torch.bool, device=target.device)
    for outer in {parent for parent in labels.parents if parent is not None}:
        unknown = (target == len(labels) + 1 + outer).flatten(1).any(1)
        known[:, [value - 1 for value in labels.members(outer)]] &= ~unknown[:, None]
    return known


def _one_hot(target: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(target, like.shape[1]).movedim(-1, 1).to(like.dtype)


def _overlap_and_size(
    p: Tensor, truth: Tensor, weight: Tensor | float, squared: bool, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    weighted = weight * p
    size = (weighted * p if squared else weighted).sum(axes) + (weight * truth).sum(axes)
    return (weighted * truth).sum(axes), size


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of the softmax outputs (B, C, ...); no gradient reaches the teacher."""
    return (student_logits.float().softmax(1) - teacher_logits.detach().float().softmax(1)).square().mean()


def certain_consistency_loss(student_logits: Tensor, teacher_logits: Tensor, certain: Tensor) -> Tensor:
    """Sum of M (p - q)^2 over voxels and classes / (C sum(M) + 1e-16) (UA-MT; docs/science.md §4).

    The 2 of the paper's denominator 2 sum(M) is its number of classes: the sum in the numerator runs over both
    channels, that of M over voxels. With C in its place, M = 1 everywhere gives :func:`consistency_loss`.

    Args:
        student_logits: (B, C, i, j, k), p = softmax of it.
        teacher_logits: (B, C, i, j, k), q = softmax of it; gets no gradient.
        certain: M, (B, i, j, k) bool.
    """
    squares = (student_logits.float().softmax(1) - teacher_logits.detach().float().softmax(1)).square()
    return (squares * certain[:, None]).sum() / (squares.shape[1] * certain.sum() + 1e-16)


def predictive_entropy(p: Tensor) -> Tensor:
    """-sum_c p_c ln(p_c + 1e-6) in nats: (B, C, ...) probabilities to (B, ...)."""
    return -(p * (p + 1e-6).log()).sum(1)


def foreground_fraction(logits: Tensor) -> Tensor:
    """Fraction of the voxels whose largest logit is not the background's, to notice collapse (docs/science.md §6.3)."""
    logits = logits.detach()
    return (logits[:, 1:].amax(1) > logits[:, 0]).float().mean()


def clipped_noise(like: Tensor, generator: torch.Generator, sigma: float = 0.1, limit: float = 0.2) -> Tensor:
    """Gaussian input noise of the Mean Teacher, clipped (docs/science.md §4: eta = clip(0.1 e, +-0.2))."""
    return (sigma * normal_noise(like.shape, generator, like.device)).clamp(-limit, limit)
