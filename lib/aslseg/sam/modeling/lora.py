"""LoRA on queries and values of SAM's image encoder, as in CFR (arXiv 2403.11229): q += B_q A_q x, v += B_v A_v x.

Every block has it, without a scale. A is initialised like a linear layer and B with zeros, so that the encoder computes
as before at first. LoRA is a torch parametrization of the ``qkv`` weights and can be merged into them, which gives a
SAM with its ordinary parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn.utils import parametrize

CFR_KEY = re.compile(r"w_([ab])_(\d+)$")


class QueryValueLoRA(nn.Module):
    """The weight (3 C, C) of a ``qkv`` layer with B_q A_q added to its first third and B_v A_v to its last.

    Args:
        channels: C.
        rank: Rows of each A, columns of each B.
        generator: Random numbers of A; None: those of torch.
    """

    def __init__(self, channels: int, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.a_q, self.a_v = (nn.Parameter(torch.empty(rank, channels)) for _ in "qv")
        self.b_q, self.b_v = (nn.Parameter(torch.zeros(channels, rank)) for _ in "qv")
        for a in (self.a_q, self.a_v):
            nn.init.kaiming_uniform_(a, math.sqrt(5), generator=generator)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        query, value = self.b_q @ self.a_q, self.b_v @ self.a_v
        return weight + torch.cat([query, torch.zeros_like(query), value])


def add_lora(encoder: ImageEncoderViT, rank: int, generator: torch.Generator | None = None) -> list[nn.Parameter]:
    """Add LoRA to every block and return its parameters, four per block.

    Args:
        encoder: Changed in place.
        rank: 4 in CFR.
        generator: Random numbers of the weights.
    """
    added: list[nn.Parameter] = []
    for block in encoder.blocks:
        layer = block.attn.qkv
        lora = QueryValueLoRA(layer.in_features, rank, generator).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", lora)
        added += lora.parameters()
    return added


def merge_lora(encoder: ImageEncoderViT) -> None:
    """Add LoRA to the weights: the encoder computes the same and has its ordinary parameters again."""
    for block in encoder.blocks:
        parametrize.remove_parametrizations(block.attn.qkv, "weight", leave_parametrized=True)


def is_cfr(state: Mapping[str, object]) -> bool:
    """Whether CFR saved a state dict: ``w_a_000``, ``w_b_000``, ... beside prompt encoder and decoder."""
    return any(CFR_KEY.match(k) for k in state)


def cfr_rank(state: Mapping[str, Tensor]) -> int:
    """Rank of CFR's LoRA."""
    return int(state["w_a_000"].shape[0])


def cfr_blocks(state: Mapping[str, object]) -> set[int]:
    """Encoder blocks for which CFR's file has all four LoRA weights."""
    has = {(m[1], int(m[2])) for m in map(CFR_KEY.match, state) if m}
    every = {number // 2 for _, number in has}
    return {n for n in every if {(part, 2 * n + which) for part in "ab" for which in (0, 1)} <= has}


def merged_cfr(base: Mapping[str, Tensor], cfr: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CFR's file applied to the SAM that it was trained from.

    Args:
        base: SAM's state dict.
        cfr: Of CFR's file: ``w_a_n`` (rank, C) and ``w_b_n`` (C, rank) in the order q0, v0, q1, v1, ..., and the keys
            of prompt encoder and mask decoder, which replace those of ``base``.

    Returns:
        The state dict of SAM with LoRA merged into the ``qkv`` weights.

    Raises:
        KeyError: A pair of LoRA weights is incomplete, or there is no such block in ``base``.
        ValueError: The shapes do not match.
    """
    own = {k: v for k, v in cfr.items() if not CFR_KEY.match(k)}
    out = {k: v for k, v in base.items() if k.startswith("image_encoder.")} | own
    numbers = {m[2] for m in map(CFR_KEY.match, cfr) if m}
    for number in sorted(numbers):
        block, part = divmod(int(number), 2)
        key = f"image_encoder.blocks.{block}.attn.qkv.weight"
        change = cfr[f"w_b_{number}"].float() @ cfr[f"w_a_{number}"].float()
        channels = len(change)
        weight = out[key].float().clone()
        if weight.shape != (3 * channels, channels):
            raise ValueError(f"LoRA of {channels} channels on a SAM of {weight.shape[1]}")
        weight[2 * part * channels : (2 * part + 1) * channels] += change
        out[key] = weight
    return out
