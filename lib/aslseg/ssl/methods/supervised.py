"""Labelled patches only: the baseline that every SSL method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from aslseg.compute.losses import foreground_fraction, segmentation_loss
from aslseg.ssl.methods.base import Batch, Logs, Method


class Supervised(Method):
    """Half cross-entropy, half Dice on the labelled stream."""

    published_consistency = None

    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`."""
        logits = self.student(batch.image)
        loss = segmentation_loss(*self.merged(logits, batch.target), batch.weight)
        return loss, {"supervised": loss.item(), "foreground": foreground_fraction(logits).item()}
