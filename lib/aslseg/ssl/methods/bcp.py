"""Bidirectional copy-paste (Bai et al., CVPR 2023; docs/science.md §4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from aslseg.compute.losses import foreground_fraction, region_loss
from aslseg.compute.schedules import ema_update
from aslseg.settings import Settings
from aslseg.ssl.methods.base import Batch, Logs, Method, make_teacher
from aslseg.types import Labels

UNLABELLED_WEIGHT = 0.5


class BidirectionalCopyPaste(Method):
    """Labelled patches pasted into unlabelled ones and the other way round; the EMA teacher labels the unlabelled part.

    M is 0 in a random box of 2/3 of each edge and 1 outside. At first x = x_1 M + x_2 (1 - M) of labelled patches, with
    the region loss R (:func:`region_loss`) over the whole. Then x_in = x_l M + x_u (1 - M), x_out = x_u M + x_l (1 - M)
    and loss = R(x_in, y, M) + 0.5 R(x_in, v, 1 - M) + 0.5 R(x_out, v, M) + R(x_out, y, 1 - M), v being what is
    connected in the teacher's map of x_u (:func:`largest_components`).

    Differences from the published code: each pair is mixed both ways, so that 2 + 2 patches give the four mixed ones
    for which it takes 4 + 4; the first phase is a quarter of the steps (there 2,000 of 17,000); the teacher enters the
    second phase as the running average of the student, and it predicts (there the student that was best on the
    test set becomes the teacher, and predicts in the end).
    """

    published_consistency = None
    labelled_fraction = 0.25

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__(network, settings)
        self.teacher = make_teacher(self.student)

    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`. With no unlabelled patches it stays in its first phase."""
        shape = batch.image.shape[2:]
        outside = copy_paste_mask(shape, generator).to(batch.image.device)
        if not len(batch.unlabelled) or self.semi_supervised_fraction(fraction) < 0:
            other = torch.arange(len(batch.image)).roll(1)
            image = batch.image * outside + batch.image[other] * (1 - outside)
            target = torch.where(outside.bool(), batch.target, batch.target[other])
            weight = torch.where(outside.bool(), batch.weight, batch.weight[other])
            logits = self.student(image)
            loss = region_loss(*self.merged(logits, target), weight)
        else:
            loss, logits = self._self_training(batch, outside)
        return loss, {"supervised": loss.item(), "foreground": foreground_fraction(logits).item()}

    def _self_training(self, batch: Batch, outside: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits of the patches mixed both ways; a shorter stream is gone through again."""
        n = torch.arange(max(len(batch.image), len(batch.unlabelled)))
        i, j = n % len(batch.image), n % len(batch.unlabelled)
        with torch.no_grad():
            pseudo = largest_components(self.teacher(batch.unlabelled).argmax(1), self.settings.label_set)[j]
        x, y, w, u = batch.image[i], batch.target[i], batch.weight[i], batch.unlabelled[j]
        inside = 1 - outside
        logits = self.student(torch.cat([x * outside + u * inside, u * outside + x * inside]))
        x_in, x_out = logits.chunk(2)
        every = torch.ones_like(w)
        human = region_loss(*self.merged(x_in, y), w * outside) + region_loss(*self.merged(x_out, y), w * inside)
        machine = region_loss(x_in, pseudo, every * inside) + region_loss(x_out, pseudo, every * outside)
        return human + UNLABELLED_WEIGHT * machine, logits

    def after_step(self, step: int, fraction: float) -> None:
        """Update the teacher, during the first phase too."""
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


def largest_components(class_maps: Tensor, labels: Labels) -> Tensor:
    """The largest 3-D component (26 neighbours) of each label that lies in no other; all else becomes background.

    A component includes the labels nested in it: an organ keeps its largest piece with all of its lesions, of which
    there may be many; lesions elsewhere are removed.

    Args:
        class_maps: (B, i, j, k) int64.
        labels: The classes and their nesting.
    """
    maps = class_maps.cpu().numpy()
    kept = np.zeros(maps.shape, bool)
    for b, regions in enumerate(labels.regions(class_map) for class_map in maps):
        for region, parent in zip(regions, labels.parents, strict=True):
            if parent is None and region.any():
                components, _ = ndimage.label(region, np.ones((3, 3, 3)))
                kept[b] |= components == np.bincount(components[region]).argmax()
    return class_maps * torch.from_numpy(kept).to(class_maps.device)
