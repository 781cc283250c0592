"""Bidirectional copy-paste (Bai et al., CVPR 2023; science.md §4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import ndimage
from torch import Tensor, nn

from aslseg.settings import Settings
from aslseg.ssl.losses import foreground_fraction, segmentation_loss
from aslseg.ssl.methods.base import Batch, Logs, Method, make_teacher
from aslseg.ssl.ramps import ema_update

PRETRAIN_PART = 0.25
UNLABELLED_WEIGHT = 0.5


class BidirectionalCopyPaste(Method):
    """Labelled patches pasted into unlabelled ones and the other way round; the EMA teacher names the unlabelled part.

    The first quarter pastes labelled patches into each other. From then on x_in = x_l M + x_u (1 - M) and
    x_out = x_u M + x_l (1 - M) with M = 0 in a random box of 2/3 of each edge; the loss of the unlabelled part
    (targets: the teacher's largest component per class) has half weight.
    """

    warm: Tensor

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__(network, settings)
        self.teacher = make_teacher(self.student)
        self.register_buffer("warm", torch.tensor(False))

    def start_from(self, state: dict[str, Tensor]) -> None:
        """A warm start has a teacher worth listening to, so copy-pasting among labelled patches is passed over."""
        super().start_from(state)
        self.warm.fill_(True)

    def loss(self, batch: Batch, part: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`. With no unlabelled patches it stays in its first phase."""
        shape = batch.image.shape[2:]
        outside = copy_paste_mask(shape, generator).to(batch.image.device)
        if not len(batch.unlabelled) or (part < PRETRAIN_PART and not self.warm):
            other = torch.arange(len(batch.image)).roll(1)
            image = batch.image * outside + batch.image[other] * (1 - outside)
            target = torch.where(outside.bool(), batch.target, batch.target[other])
            weight = torch.where(outside.bool(), batch.weight, batch.weight[other])
        else:
            image, target, weight = self._mixed(batch, outside)
        logits = self.student(image)
        loss = segmentation_loss(logits, target, weight)
        return loss, {"supervised": loss.item(), "foreground": foreground_fraction(logits).item()}

    def _mixed(self, batch: Batch, outside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unlabelled = batch.unlabelled
        with torch.no_grad():
            pseudo = largest_components(self.teacher(unlabelled).argmax(1))
        n = torch.arange(max(len(batch.image), len(unlabelled)))
        i, j = n % len(batch.image), n % len(unlabelled)
        x, y, w = batch.image[i], batch.target[i], batch.weight[i]
        u, v, z = unlabelled[j], pseudo[j], torch.full_like(w, UNLABELLED_WEIGHT)
        keep = outside.bool()
        image = torch.cat([x * outside + u * (1 - outside), u * outside + x * (1 - outside)])
        target = torch.cat([torch.where(keep, y, v), torch.where(keep, v, y)])
        weight = torch.cat([torch.where(keep, w, z), torch.where(keep, z, w)])
        return image, target, weight

    def after_step(self, step: int, part: float) -> None:
        """The teacher follows; when self-training starts it has been following for a quarter of the steps."""
        ema_update(self.teacher, self.student, step, self.settings.ema_decay)

    @property
    def predictor(self) -> nn.Module:
        """The teacher."""
        return self.teacher


def copy_paste_mask(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """(i, j, k) float mask: 0 inside one random box of two thirds of each edge, 1 outside."""
    mask = torch.ones(tuple(shape))
    window = []
    for n in shape:
        edge = max(1, n * 2 // 3)
        start = int(torch.randint(0, n - edge + 1, (1,), generator=generator))
        window.append(slice(start, start + edge))
    mask[tuple(window)] = 0
    return mask


def largest_components(class_maps: Tensor) -> Tensor:
    """Largest 3-D component of each foreground class of (B, i, j, k) class maps; the rest becomes background."""
    maps = class_maps.cpu().numpy()
    out = torch.zeros_like(class_maps)
    for b, class_map in enumerate(maps):
        for value in range(1, int(class_map.max()) + 1):
            components, count = ndimage.label(class_map == value)
            if count:
                largest = ndimage.sum_labels(class_map == value, components, range(1, count + 1)).argmax() + 1
                out[b][torch.from_numpy(components == largest).to(out.device)] = value
    return out
