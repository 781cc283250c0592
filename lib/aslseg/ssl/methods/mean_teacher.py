"""Mean Teacher (Tarvainen & Valpola 2017) as the SSL segmentation literature trains it (docs/science.md §4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aslseg.compute.losses import clipped_noise, consistency_loss, foreground_fraction, segmentation_loss
from aslseg.compute.schedules import ema_update
from aslseg.settings import Settings
from aslseg.ssl.methods.base import Batch, Logs, Method, make_teacher


class MeanTeacher(Method):
    """The student agrees with an EMA of itself on noisy unlabelled patches; the teacher predicts.

    loss = l_sup + lambda(t) mean (softmax f(x_u) - softmax f_ema(x_u + eta))^2 with lambda ramped up to 0.1, or to the
    setting ``consistency``, and eta Gaussian noise clipped at two standard deviations.
    """

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__(network, settings)
        self.teacher = make_teacher(self.student)

    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`."""
        labelled = len(batch.image)
        logits = self.student(torch.cat([batch.image, batch.unlabelled]))
        supervised = segmentation_loss(*self.merged(logits[:labelled], batch.target), batch.weight)
        logs = {"supervised": supervised.item(), "foreground": foreground_fraction(logits[:labelled]).item()}
        if not len(batch.unlabelled):
            return supervised, logs
        consistency = self.consistency(logits[labelled:], batch.unlabelled, fraction, generator)
        logs["consistency"] = consistency.item()
        return supervised + self.consistency_weight(fraction) * consistency, logs

    def consistency(self, logits: Tensor, unlabelled: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
        """Disagreement of the student's ``logits`` with the teacher on the same patches, a scalar."""
        return consistency_loss(logits, self.noisy_teacher(unlabelled, generator))

    @torch.no_grad()
    def noisy_teacher(self, patches: Tensor, generator: torch.Generator) -> Tensor:
        """One pass of the teacher: logits of (U, 1, i, j, k) patches with fresh input noise and dropout."""
        return self.teacher(patches + clipped_noise(patches, generator))

    def after_step(self, step: int, fraction: float) -> None:
        """Update the teacher."""
        ema_update(self.teacher, self.student, step, self.settings.ema_decay)

    @property
    def predictor(self) -> nn.Module:
        """The teacher."""
        return self.teacher
