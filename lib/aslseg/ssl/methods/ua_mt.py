"""Uncertainty-aware Mean Teacher (Yu et al., MICCAI 2019; docs/science.md §4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aslseg.compute.losses import certain_consistency_loss, predictive_entropy
from aslseg.compute.schedules import sigmoid_ramp
from aslseg.ssl.methods.mean_teacher import MeanTeacher

PASSES = 8


class UncertaintyAwareMeanTeacher(MeanTeacher):
    """Mean Teacher that learns only from voxels on which its teacher is certain.

    Eight noisy passes of the teacher (input noise and dropout) give p = their mean softmax and u = -sum_c p_c ln p_c. A
    voxel counts where u < H(t) = (0.75 + 0.25 ramp(t)) ln C with C classes, the background included: ln C is the
    largest possible entropy, ln 2 in the paper. The student is compared with a ninth pass.

    The passes run one after another into a running mean, so that they need the memory of one.
    """

    def consistency(self, logits: Tensor, unlabelled: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
        """See :class:`MeanTeacher`."""
        target = self.noisy_teacher(unlabelled, generator)
        mean = torch.zeros_like(target, dtype=torch.float32)
        for _ in range(PASSES):
            mean += self.noisy_teacher(unlabelled, generator).float().softmax(1) / PASSES
        threshold = (0.75 + 0.25 * sigmoid_ramp(fraction)) * math.log(mean.shape[1])
        return certain_consistency_loss(logits, target, predictive_entropy(mean) < threshold)
