"""Mutual consistency, MC-Net+ (Wu et al., Medical Image Analysis 2022; docs/science.md §4)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor, nn

from aslseg.compute.losses import dice_loss, foreground_fraction
from aslseg.errors import BadSettingsError
from aslseg.settings import Settings
from aslseg.ssl.methods.base import Batch, Logs, Method, load_published
from aslseg.ssl.networks import VNet

SUPERVISED_WEIGHT = 0.5
TEMPERATURE = 0.1


class MutualConsistency(Method):
    """One V-Net encoder and three decoders that up-sample differently; each has to agree with the sharpened others.

    loss = 0.5 sum_d Dice(p_d, y) + lambda(t) sum_(d != e) mean (p_d - sharp(p_e))^2, the first over labelled patches,
    the second over all, lambda up to 1, sharp(p) = p^(1/T) normalised over the classes with T = 0.1. As in the
    published code, gradients flow through both sides, the Dice has plain (not squared) denominators, and
    cross-entropy is not added.

    The first decoder predicts; with the encoder it is an ordinary V-Net, and that is what is published.

    Raises:
        BadSettingsError: The network is no V-Net.
    """

    published_consistency = 1.0
    student: VNet

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__(network, settings)
        if not isinstance(self.student, VNet):
            raise BadSettingsError(
                f"ssl_method = mcnet gives a V-Net three decoders, and network = {settings.network} is no V-Net; "
                "set network to vnet or vnet_small, or choose another ssl_method"
            )
        self.others = nn.ModuleList(self.student.decoder_with(up) for up in ("trilinear", "nearest"))

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Warm start; the other decoders get the first one's weights, apart from the up-sampling."""
        load_published(self.student, state, self.settings)
        shared = {name: tensor for name, tensor in state.items() if name.startswith(("decoder.", "head."))}
        for decoder in self.others:
            decoder.load_state_dict(shared, strict=False)

    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """See :class:`Method`."""
        labelled = len(batch.image)
        features = self.student.encode(torch.cat([batch.image, batch.unlabelled]))
        logits = [decode(features).float() for decode in (self.student.decode, *self.others)]
        p = [one.softmax(1) for one in logits]
        sharp = [sharpened(one) for one in logits]
        known = [self.merged(one[:labelled], batch.target) for one in logits]
        dice = [dice_loss(z.softmax(1), y, batch.weight, squared=False, epsilon=1e-8) for z, y in known]
        supervised = SUPERVISED_WEIGHT * torch.stack(dice).sum()
        pairs = [(p[d] - sharp[e]).square().mean() for d, e in permutations(range(len(p)), 2)]
        consistency = torch.stack(pairs).sum()
        logs = {
            "supervised": supervised.item(),
            "foreground": foreground_fraction(logits[0][:labelled]).item(),
            "consistency": consistency.item(),
        }
        return supervised + self.consistency_weight(fraction) * consistency, logs


def sharpened(logits: Tensor) -> Tensor:
    """p^(1/T) / sum_c p_c^(1/T) of p = softmax of (B, C, ...) logits; the powers cancel to softmax(logits / T)."""
    return (logits / TEMPERATURE).softmax(1)
