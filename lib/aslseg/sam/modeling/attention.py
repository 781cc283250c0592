"""The attention of SAM's image encoder with less computation.

segment-anything multiplies queries and keys, adds the relative positions to the whole matrix and takes its softmax.
Here torch's fused kernel does that, with the relative positions as its mask. Where a token grid is padded to full
windows (16 to 28 tokens at 256 px), the padding is not multiplied: it is zero before the projection, so that all of it
has the same key and the same value, the bias of the projection, and its outputs are not used. The padding of a window
becomes one additional key, whose logit is the log-sum-exp over its positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, ImageEncoderViT, get_rel_pos
from torch import Tensor


def use_fused_attention(encoder: ImageEncoderViT) -> None:
    """Replace the forward pass of an encoder's attention modules; a second call does nothing.

    Outputs agree with those of segment-anything to rounding. Only instances of segment-anything's own class are
    changed; weights and their names stay as they are.
    """
    grid = encoder.img_size // encoder.patch_embed.proj.stride[0]
    for block in encoder.blocks:
        attention = block.attn
        if type(attention) is Attention and attention.use_rel_pos and "forward" not in attention.__dict__:
            attention.window = block.window_size or grid
            attention.windows = (-(-grid // attention.window)) ** 2
            attention.rectangles = list(_rectangles(grid, attention.window))
            attention.forward = MethodType(_forward, attention)


def _rectangles(grid: int, window: int) -> Iterator[tuple[Tensor, int, int]]:
    """Groups of windows that have the same numbers of rows and columns without padding.

    Yields:
        Indices (n, h w) of the tokens of n windows among the tokens of all windows, which follow one another; h; w.
    """
    along = -(-grid // window)
    tokens = torch.arange(along**2 * window**2).view(along, along, window, window)
    sides = [(slice(0, grid // window), window), (slice(grid // window, along), grid % window)]
    for rows, h in sides:
        for columns, w in sides:
            part = tokens[rows, columns, :h, :w]
            if part.numel():
                yield part.reshape(-1, h * w), h, w


def _forward(self: Attention, x: Tensor) -> Tensor:
    """Tokens (B, window, window, C) to tokens of that shape; zeros where they are padding."""
    images, heads, channels = x.shape[0] // self.windows, self.num_heads, x.shape[-1]
    tokens = x.reshape(images, -1, channels)
    real = torch.cat([index.flatten() for index, _, _ in self.rectangles]).to(x.device)
    parts = self.qkv(tokens[:, real]).split([index.numel() for index, _, _ in self.rectangles], 1)
    attended = []
    for part, (index, h, w) in zip(parts, self.rectangles, strict=True):
        q, k, v = part.reshape(images * len(index), h * w, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rows, columns = _relative(self, q.reshape(len(q), heads, h, w, -1))
        mask = (rows[..., :h, None] + columns[..., None, :w]).flatten(4).flatten(2, 3)
        if h < self.window or w < self.window:
            k, v, logit = _with_padding(self, q, k, v, rows, columns)
            mask = torch.cat([mask, logit.to(mask.dtype)], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended.append(out.transpose(1, 2).reshape(images, -1, channels))
    projected = self.proj(torch.cat(attended, 1))
    done = projected.new_zeros(tokens.shape)
    done[:, real] = projected
    return done.view(x.shape)


def _relative(self: Attention, q: Tensor) -> tuple[Tensor, Tensor]:
    """The additions of the relative positions to the logits of queries (n, heads, h, w, c), by row and by column.

    Returns:
        Two arrays (n, heads, h, w, window); for a key, those of its row and its column are summed.
    """
    size, (h, w) = self.window, q.shape[2:4]
    by_row = get_rel_pos(size, size, self.rel_pos_h)[:h].to(q.dtype)
    by_column = get_rel_pos(size, size, self.rel_pos_w)[:w].to(q.dtype)
    return torch.einsum("nyhwc,hkc->nyhwk", q, by_row), torch.einsum("nyhwc,wkc->nyhwk", q, by_column)


def _with_padding(
    self: Attention, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (n, heads, h w + 1, c), the last ones those of the padding, and the addition to its logits.

    The padding lies below the h rows, and beside the w columns of these rows.
    """
    n, heads, _, c = q.shape
    h, w = rows.shape[2:4]
    bias = q.new_zeros(3 * heads * c) if self.qkv.bias is None else self.qkv.bias.to(q.dtype)
    _, key, value = bias.view(3, 1, heads, 1, c).expand(3, n, heads, 1, c).unbind(0)
    y, x = rows.float(), columns.float()
    below = y[..., h:].logsumexp(-1) + x.logsumexp(-1)
    beside = y[..., :h].logsumexp(-1) + x[..., w:].logsumexp(-1)
    return torch.cat([k, key], 2), torch.cat([v, value], 2), torch.logaddexp(below, beside).flatten(2)[..., None]
