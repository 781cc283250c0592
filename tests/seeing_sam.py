"""A SAM that needs no training: it sees what is bright."""

from __future__ import annotations

import torch
from torch import Tensor

from aslseg.sam.build import SAMModel


class Sees(SAMModel):
    """Stands for a perfect SAM: answers with what is bright on the slice, where the prompt is; counts its work."""

    def __init__(self, base: SAMModel) -> None:
        super().__init__(base.sam, base.architecture)
        self.bf16, self.encoded, self.asked = False, 0, []

    def encode(self, slices: Tensor) -> Tensor:
        self.encoded += len(slices)
        low = self.to_low_res(slices)
        # the embedding itself carries the picture: (B, 16, grid, grid) holds every low-res pixel
        return torch.pixel_unshuffle(low[:, None], 4)

    def decode(self, embeddings: Tensor, points=None, boxes=None, masks=None, multimask=False):
        self.asked.append((points, boxes, masks))
        low = torch.pixel_shuffle(embeddings, 4)
        believed = 0.9 if (low > 0.5).any() else 0.1
        logits = (low - 0.5) * 60
        return logits, torch.full((len(logits), 1), believed)
