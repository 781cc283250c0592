"""Copy-paste inside Mean Teacher, from weak to strong views: our own combination (docs/science.md §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from aslseg.compute.losses import foreground_fraction, segmentation_loss
from aslseg.compute.schedules import sigmoid_ramp
from aslseg.ssl.methods.base import Batch, Logs
from aslseg.ssl.methods.bcp import copy_paste_mask
from aslseg.ssl.methods.mean_teacher import MeanTeacher

PSEUDO_WEIGHT = 0.5
RAMP_PART = 0.3


class CopyPasteTeacher(MeanTeacher):
    """Labelled patches stay whole; unlabelled ones get a piece of a labelled one, and the EMA teacher labels the rest.

    loss = l_sup(x_l) + 0.5 lambda(t) l_sup(x_m), x_m = x_u M + x_l (1 - M) with M = 0 in a random box of two thirds of
    each edge, or outside of it (Bai et al., CVPR 2023, mix all labelled patches instead). Pasted voxels keep their true
    class. The others have the teacher's, found before the patch's intensities were changed (weak to strong, Sohn et
    al. 2020), and weigh as much as its margin between the two best classes, so that nothing has to be cut at the
    largest component: there may be many lesions. The two streams go through the student one after the other, so that
    batch norm sees the labelled patches by themselves.

    The unlabelled patches come in when 60 % of the steps are done, and lambda ramps up over the first 30 % of what is
    left: while labelled patches alone still improve the network, steps are better spent on them.
    """

    published_consistency = None
    labelled_fraction = 0.6

    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`. With no unlabelled patches it learns from the labelled ones alone."""
        logits = self.student(batch.image)
        supervised = segmentation_loss(*self.merged(logits, batch.target), batch.weight)
        logs = {"supervised": supervised.item(), "foreground": foreground_fraction(logits).item()}
        fraction = self.semi_supervised_fraction(fraction)
        if not len(batch.unlabelled) or fraction < 0:
            return supervised, logs
        image, target, weight = self._mixed(batch, generator)
        mixed = segmentation_loss(*self.merged(self.student(image), target), weight)
        logs["mixed"] = mixed.item()
        return supervised + PSEUDO_WEIGHT * sigmoid_ramp(fraction / RAMP_PART) * mixed, logs

    def _mixed(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed patches (U, 1, i, j, k), their classes and voxel weights (U, i, j, k)."""
        with torch.no_grad():
            best, pseudo = self.teacher(batch.weak).float().softmax(1).topk(2, dim=1)
        margin = best[:, 0] - best[:, 1]
        n = torch.arange(len(batch.unlabelled)) % len(batch.image)
        own = copy_paste_mask(batch.image.shape[2:], generator).to(batch.image.device)
        if torch.rand(1, generator=generator) < 0.5:
            own = 1 - own
        return (
            batch.unlabelled * own + batch.image[n] * (1 - own),
            torch.where(own.bool(), pseudo[:, 0], batch.target[n]),
            torch.where(own.bool(), margin, batch.weight[n]),
        )
