"""Cross pseudo supervision (Chen et al., CVPR 2021; docs/science.md §4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aslseg.compute.losses import foreground_fraction, segmentation_loss
from aslseg.settings import Settings
from aslseg.ssl.methods.base import Batch, Logs, Method, load_published


class CrossPseudoSupervision(Method):
    """Two networks with different initial weights learn from each other's predictions; the first one predicts.

    loss = sum_k l_sup(f_k) + lambda(t) CE(f_k(x_u), argmax f_other(x_u)), k = 1, 2. The first network's convolutions
    start from Kaiming's normal distribution, the second one's from Xavier's. Pseudo-labels pass no gradient.
    """

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__(network, settings)
        self.second = network()
        _initialise(self.student, nn.init.kaiming_normal_)
        _initialise(self.second, nn.init.xavier_normal_)

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Warm start of the first network only: two equal networks would learn nothing from each other."""
        load_published(self.student, state, self.settings)

    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`."""
        labelled = len(batch.image)
        x = torch.cat([batch.image, batch.unlabelled])
        first, second = self.student(x), self.second(x)
        supervised = segmentation_loss(*self.merged(first[:labelled], batch.target), batch.weight)
        supervised = supervised + segmentation_loss(*self.merged(second[:labelled], batch.target), batch.weight)
        logs = {"supervised": supervised.item(), "foreground": foreground_fraction(first[:labelled]).item()}
        if not len(batch.unlabelled):
            return supervised, logs
        cross = _learn_from(first[labelled:], second[labelled:]) + _learn_from(second[labelled:], first[labelled:])
        logs["consistency"] = cross.item()
        return supervised + self.consistency_weight(fraction) * cross, logs


def _learn_from(logits: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), other.detach().argmax(1))


def _initialise(network: nn.Module, weights: Callable[[Tensor], Tensor]) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            weights(module.weight)
