"""Dual-task consistency (Luo et al., AAAI 2021; docs/science.md §4)."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from aslseg.compute.losses import classes_known, dice_loss, foreground_fraction, weighted_mean
from aslseg.ssl.methods.base import Batch, Logs, Method

DISTANCE_WEIGHT = 0.3
STEEPNESS = 1500.0


class DualTaskConsistency(Method):
    """One network predicts every class and, as a second task, its signed distance; the two have to agree.

    The network has one more output per foreground class; d = tanh of it is the distance. With p = softmax of the
    classes, loss = Dice(p, y) + 0.3 mean (d - SDF(y))^2 + lambda(t) mean (sigmoid(-1500 d) - p_fg)^2, the first two
    terms over labelled patches, the last over all, lambda up to 1. With one foreground class softmax is the sigmoid
    of the logits' difference, and this is the paper's binary loss. There is no cross-entropy: the published code
    computes one and does not add it.
    """

    published_consistency = 1.0

    @property
    def extra_outputs(self) -> int:
        """One distance per foreground class."""
        return len(self.settings.label_set)

    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`."""
        labelled, classes = len(batch.image), len(self.settings.label_set) + 1
        output = self.student(torch.cat([batch.image, batch.unlabelled])).float()
        p, distance = output[:, :classes].softmax(1), output[:, classes:].tanh()
        logits, target = self.merged(output[:labelled, :classes], batch.target)
        known = classes_known(batch.target, self.settings.label_set)[..., None, None, None]
        error = ((distance[:labelled] - signed_distance(target, classes)).square() * known).mean(1)
        supervised = dice_loss(logits.softmax(1), target, batch.weight)
        supervised = supervised + DISTANCE_WEIGHT * weighted_mean(error, batch.weight)
        consistency = (torch.sigmoid(-STEEPNESS * distance) - p[:, 1:]).square().mean()
        logs = {
            "supervised": supervised.item(),
            "foreground": foreground_fraction(output[:labelled, :classes]).item(),
            "consistency": consistency.item(),
        }
        return supervised + self.consistency_weight(fraction) * consistency, logs


def signed_distance(target: Tensor, classes: int) -> Tensor:
    """Signed distance to every foreground class, normalised in each patch and class (on the CPU, by scipy).

    Outside: distance to the nearest voxel of the class over the largest such distance, 0..1. Inside: minus the
    distance to the nearest other voxel over the largest such distance, -1..0, with 0 on the class's own boundary
    voxels. A patch without the class is 1 throughout, one full of it -1; the published code has 0, "boundary", in the
    former and divides by zero in the latter.

    Args:
        target: (B, i, j, k) class maps.
        classes: C, background included.

    Returns:
        (B, C - 1, i, j, k) float32 on the device of ``target``; voxels count as cubes.
    """
    maps = target.cpu().numpy()
    found = np.stack([np.stack([_signed_distance(m == value) for value in range(1, classes)]) for m in maps])
    return torch.from_numpy(found).to(target.device)


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        return np.ones(mask.shape, np.float32)
    if mask.all():
        return np.full(mask.shape, -1, np.float32)
    outside, inside = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
    # the boundary voxels of the class are those at distance 1 from the rest
    depth = np.where(inside == 1, 0, inside / inside.max())
    return (outside / outside.max() - depth).astype(np.float32)
