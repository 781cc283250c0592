"""SAM-Med2D's adapter: a small convolutional network beside the MLP of every encoder block (arXiv 2308.16184).

With u the tokens after a block's second norm, the block adds MLP(u) + Adapter(u). Parameter names are those of
SAM-Med2D's files.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn


class Med2dAdapter(nn.Module):
    """LayerNorm(v + ReLU(up(ReLU(down(g v))))): a channel gate g, then a strided and a transposed convolution.

    Its output has unit scale from the start: a trained encoder to which it is added does not compute as before.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.channel = nn.Sequential(
            nn.Linear(channels, channels // 4, bias=False),
            nn.ReLU(),
            nn.Linear(channels // 4, channels, bias=False),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, C) to (B, h, w, C); h and w are even."""
        v = tokens.permute(0, 3, 1, 2)
        gated = v * self.channel(v.mean((2, 3)))[:, :, None, None]
        return self.norm((v + self.spatial(gated)).permute(0, 2, 3, 1))


class MLPWithAdapter(MLPBlock):
    """The MLP of a block, to which the output of the adapter on the same tokens is added."""

    def __init__(self, mlp: MLPBlock, adapter: Med2dAdapter) -> None:
        nn.Module.__init__(self)
        self.lin1, self.lin2, self.act = mlp.lin1, mlp.lin2, mlp.act
        self.hidden = (adapter,)  # no submodule: the weights of the adapter are listed once, under the block

    def forward(self, tokens: Tensor) -> Tensor:
        """MLP(u) + Adapter(u) for tokens (B, h, w, C)."""
        return super().forward(tokens) + self.hidden[0](tokens)


def add_adapters(encoder: ImageEncoderViT, generator: torch.Generator | None = None) -> None:
    """Give every block an adapter ``block.Adapter`` with SAM-Med2D's initialisation (Kaiming normal, fan out).

    Args:
        encoder: Changed in place. Its token grid must be even.
        generator: Source of the weights; None: torch's own.
    """
    for block in encoder.blocks:
        adapter = Med2dAdapter(block.norm2.normalized_shape[0])
        for part in adapter.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and not part.weight.is_meta:
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        block.Adapter = adapter.to(block.norm2.weight.device)
        block.mlp = MLPWithAdapter(block.mlp, adapter)
