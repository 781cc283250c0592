"""The same attention in SAM's image encoder with less work.

segment-anything multiplies queries and keys, adds the relative positions to the whole matrix and takes its softmax.
Here torch's fused kernel does that with the relative positions as its mask. And where a token grid is padded to full
windows (16 to 28 tokens at 256 px, three quarters of them padding), the padding is not multiplied: it is zero before
the projection, so that all of it has one key and one value, the projection's bias, and nobody reads what it attends to.
The padding of a window is one key more, whose logit is the log-sum-exp over its places.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, ImageEncoderViT, get_rel_pos
from torch import Tensor


def use_fused_attention(encoder: ImageEncoderViT) -> None:
    """Let an encoder's attention modules compute as above; a second call does nothing.

    Outputs agree with segment-anything's to rounding (1e-5 in single precision). Only modules that are exactly
    segment-anything's are touched; weights, keys and everything else stay as they are.
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
    """Windows with the same number of rows and columns that are no padding.

    Yields:
        Indices (n, h w) of the tokens of n such windows among all tokens of all windows in a row; h; w.
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
    """What the relative positions add to the logits of queries (n, heads, h, w, c): by row and by column of the window.

    Returns:
        Two of (n, heads, h, w, window); a key's share is the sum of its row's and its column's.
    """
    size, (h, w) = self.window, q.shape[2:4]
    by_row = get_rel_pos(size, size, self.rel_pos_h)[:h].to(q.dtype)
    by_column = get_rel_pos(size, size, self.rel_pos_w)[:w].to(q.dtype)
    return torch.einsum("nyhwc,hkc->nyhwk", q, by_row), torch.einsum("nyhwc,wkc->nyhwk", q, by_column)


def _with_padding(
    self: Attention, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (n, heads, h w + 1, c) with the padding's as the last, and what is to be added to its logits.

    The padding is what lies below the h rows, and beside the w columns of these.
    """
    n, heads, _, c = q.shape
    h, w = rows.shape[2:4]
    bias = q.new_zeros(3 * heads * c) if self.qkv.bias is None else self.qkv.bias.to(q.dtype)
    _, key, value = bias.view(3, 1, heads, 1, c).expand(3, n, heads, 1, c).unbind(0)
    y, x = rows.float(), columns.float()
    below = y[..., h:].logsumexp(-1) + x.logsumexp(-1)
    beside = y[..., :h].logsumexp(-1) + x[..., w:].logsumexp(-1)
    return torch.cat([k, key], 2), torch.cat([v, value], 2), torch.logaddexp(below, beside).flatten(2)[..., None]
