"""The same attention in SAM's image encoder with less work.

segment-anything multiplies queries and keys, adds the relative positions to the whole matrix and takes its softmax.
Here torch's fused kernel does that with the relative positions as its mask. And where a token grid is padded to full
windows (16 to 28 tokens at 256 px, three quarters of them padding), the padding is not multiplied: it is zero before
the projection, so that its keys and values are the projection's bias, and nobody reads what it attends to.
"""

from __future__ import annotations

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
            attention.windows, attention.real_tokens = _windows(grid, block.window_size)
            attention.forward = MethodType(_forward, attention)


def _windows(grid: int, window: int) -> tuple[int, Tensor | None]:
    """Windows of an image, and the indices of the tokens that are no padding among all their tokens in a row.

    None without padding.
    """
    along = -(-grid // window) if window else 1
    if not window or grid % window == 0:
        return along**2, None
    real = torch.zeros(along * window, along * window, dtype=torch.bool)
    real[:grid, :grid] = True
    return along**2, real.view(along, window, along, window).transpose(1, 2).flatten().nonzero()[:, 0]


def _forward(self: Attention, x: Tensor) -> Tensor:
    """Tokens (B, h, w, C) to tokens (B, h, w, C); zeros where they are padding."""
    b, h, w, c = x.shape
    real = self.real_tokens
    if real is None:
        qkv = self.qkv(x)
    else:
        images, real = b // self.windows, real.to(x.device)
        x = x.reshape(images, -1, c)
        some = self.qkv(x[:, real])
        bias = some.new_zeros(some.shape[-1]) if self.qkv.bias is None else self.qkv.bias.to(some.dtype)
        qkv = bias.expand(images, x.shape[1], -1).clone()
        qkv[:, real] = some
    q, k, v = qkv.view(b, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    places = q.reshape(b * self.num_heads, h, w, -1)
    rows = torch.einsum("bhwc,hkc->bhwk", places, get_rel_pos(h, h, self.rel_pos_h).to(q.dtype))
    columns = torch.einsum("bhwc,wkc->bhwk", places, get_rel_pos(w, w, self.rel_pos_w).to(q.dtype))
    relative = (rows[..., :, None] + columns[..., None, :]).reshape(b, self.num_heads, h * w, h * w)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=relative).transpose(1, 2)
    if real is None:
        return self.proj(out.reshape(b, h, w, c))
    out = out.reshape(x.shape)
    done = torch.zeros_like(out)
    done[:, real] = self.proj(out[:, real]).to(done.dtype)
    return done.view(b, h, w, c)
