"""The adaptation network: a small U-Net that corrects the logits of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

CHANNELS = (16, 32, 64, 64)
FEATURES = 8
LOGIT_LIMIT = 4.0
KAPPA = 0.1


def strides_for(spacing: Sequence[float]) -> list[list[int]]:
    """Stride of each level along i, j, k: an axis is halved only while it is not much coarser than the finest."""
    current, strides = list(spacing), []
    for _ in CHANNELS[1:]:
        finest = min(current)
        step = [2 if s < 1.6 * finest else 1 for s in current]
        current = [s * n for s, n in zip(current, step, strict=True)]
        strides.append(step)
    return strides


class AdaptationNetwork(nn.Module):
    """z = U([x, s, p]) + kappa_s clip(logit s) + kappa_p clip(logit p), per region (gated residual).

    The last layer of U starts at zero and both kappas at 0.1, so that an untrained network decides as the mean of
    SAM's and the SSL model's logits. Larger kappas are harder to learn from: where an input is wrong with certainty, U
    has to outweigh it first.

    Args:
        regions: R, the number of regions.
        strides: Of each of the three levels, as :func:`strides_for` gives them.
        images: V, views of the scan: 1, and one for each parent of nested labels with relative intensities.
    """

    def __init__(self, regions: int, strides: Sequence[Sequence[int]] = ((2, 2, 2),) * 3, images: int = 1) -> None:
        super().__init__()
        self.regions, self.images = regions, images
        self.body = UNet(
            3,
            images + 2 * regions,
            FEATURES,
            CHANNELS,
            [tuple(s) for s in strides],
            num_res_units=1,
            norm=("instance", {"affine": True}),
        )
        self.head = nn.Conv3d(FEATURES, regions, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.kappa = nn.Parameter(torch.full((2, regions), KAPPA))

    def prior(self, inputs: Tensor) -> Tensor:
        """The term of the logits that comes directly from the inputs, (B, R, i, j, k) float32."""
        given = torch.logit(inputs[:, self.images :].float(), eps=1e-3).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        gated = given.unflatten(1, (2, self.regions)) * self.kappa.float()[None, :, :, None, None, None]
        return gated.sum(1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the refined regions.

        Args:
            inputs: (B, V + 2R, i, j, k): the centred images, SAM's R region probabilities, the SSL model's. Each
                axis a multiple of 8.

        Returns:
            (B, R, i, j, k) float32.
        """
        scaled = torch.cat([inputs[:, : self.images], 2 * inputs[:, self.images :] - 1], 1)
        scaled = scaled.contiguous(memory_format=torch.channels_last_3d)
        return self.head(self.body(scaled)).float() + self.prior(inputs)
