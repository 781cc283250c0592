"""Mean Teacher (Tarvainen & Valpola 2017) as the SSL segmentation literature trains it (science.md §4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aslseg.settings import Settings
from aslseg.ssl.losses import clipped_noise, consistency_loss, foreground_fraction, segmentation_loss
from aslseg.ssl.methods.base import Batch, Logs, Method, make_teacher
from aslseg.ssl.ramps import ema_update, sigmoid_ramp


class MeanTeacher(Method):
    """The student agrees with an EMA of itself on noisy unlabelled patches; the teacher predicts.

    loss = l_sup + lambda(t) mean (softmax f(x_u) - softmax f_ema(x_u + eta))^2 with lambda ramped up to the setting
    ``consistency``.
    """

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__(network, settings)
        self.teacher = make_teacher(self.student)

    def loss(self, batch: Batch, part: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`."""
        labelled = len(batch.image)
        logits = self.student(torch.cat([batch.image, batch.unlabelled]))
        supervised = segmentation_loss(logits[:labelled], batch.target, batch.weight)
        logs = {"supervised": supervised.item(), "foreground": foreground_fraction(logits[:labelled]).item()}
        if not len(batch.unlabelled):
            return supervised, logs
        with torch.no_grad():
            noisy = batch.unlabelled + clipped_noise(batch.unlabelled, generator)
            target = self.teacher(noisy)
        consistency = consistency_loss(logits[labelled:], target)
        logs["consistency"] = consistency.item()
        return supervised + self.settings.consistency * sigmoid_ramp(part) * consistency, logs

    def after_step(self, step: int, part: float) -> None:
        """The teacher follows the student."""
        ema_update(self.teacher, self.student, step, self.settings.ema_decay)

    @property
    def predictor(self) -> nn.Module:
        """The teacher."""
        return self.teacher
