"""The sizes a SAM can have, and segment-anything's own modules put together for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from aslseg.sam.modeling.med2d_adapter import add_adapters


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a SAM before its weights are known.

    Attributes:
        image_size: Edge of the square input in pixels.
        patch_size: Edge of a token in pixels.
        embed_dim, depth, heads, window, global_blocks: The image encoder.
        out_chans: Channels of the image embedding, prompt encoder and decoder.
        mlp_dim: Width of the decoder's MLPs.
        decoder_heads: Attention heads of the decoder.
        masks: Masks offered for an ambiguous prompt; there is one token more, for the single answer.
        canvas: Whether it answers whole canvases (:mod:`aslseg.sam.cfr.canvas`) instead of prompts: there is then one
            mask per label, and the first token is the background.
        adapters: Whether the encoder's blocks carry SAM-Med2D's adapters.
        box_mask: Whether a box without a mask comes with the ellipse in it as mask prompt, as for SAMs that we trained:
            a coarse grid of tokens places a box only roughly, a mask prompt to a quarter of a token.
        mask_prompt: What a mask prompt holds: SAM takes logits, SAM-Med2D probabilities.
        multimask: When several masks are offered, of which the one counts whose IoU is predicted best: for
            ``ambiguous`` prompts (SAM: a lone point), ``always`` (SAM-Med2D, whose single answer was never trained) or
            ``never`` (MedSAM, which trained nothing else).
        resize: ``longest`` keeps the aspect ratio and pads; ``squash`` does not (MedSAM, SAM-Med2D).
        interpolation: How a slice comes to its size: SAM bilinear, MedSAM bicubic, SAM-Med2D nearest.
        scaling: ``imagenet`` (SAM's mean and standard deviation), ``minmax`` (MedSAM: each slice to 0..1) or
            ``zscore`` (CFR's files: each volume to zero mean and unit variance).
    """

    image_size: int = 192
    patch_size: int = 8
    embed_dim: int = 128
    depth: int = 6
    heads: int = 4
    window: int = 8
    global_blocks: tuple[int, ...] = (2, 5)
    out_chans: int = 128
    mlp_dim: int = 512
    decoder_heads: int = 8
    masks: int = 3
    canvas: bool = False
    adapters: bool = False
    box_mask: bool = False
    mask_prompt: Literal["logits", "probabilities"] = "logits"
    multimask: Literal["ambiguous", "always", "never"] = "ambiguous"
    resize: Literal["longest", "squash"] = "longest"
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    scaling: Literal["imagenet", "minmax", "zscore"] = "imagenet"

    @classmethod
    def from_metadata(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of :func:`dataclasses.asdict` through JSON; our files that are silent on it have ``box_mask``."""
        return cls(**{"box_mask": True, **values, "global_blocks": tuple(values["global_blocks"])})

    @property
    def grid(self) -> int:
        """Tokens along one edge."""
        return self.image_size // self.patch_size

    def use_multimask(self, ambiguous: bool) -> bool:
        """Whether a prompt, ambiguous or not, is answered with several masks."""
        return self.multimask == "always" or (ambiguous and self.multimask == "ambiguous")


SMALL = Architecture(box_mask=True)
VIT_B = Architecture(1024, 16, 768, 12, 12, 14, (2, 5, 8, 11), 256, 2048)
VIT_L = Architecture(1024, 16, 1024, 24, 16, 14, (5, 11, 17, 23), 256, 2048)
VIT_H = Architecture(1024, 16, 1280, 32, 16, 14, (7, 15, 23, 31), 256, 2048)


def build(architecture: Architecture) -> Sam:
    """A SAM with random weights."""
    a = architecture
    imagenet = a.scaling == "imagenet"
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=a.image_size,
            patch_size=a.patch_size,
            embed_dim=a.embed_dim,
            depth=a.depth,
            num_heads=a.heads,
            mlp_ratio=4,
            out_chans=a.out_chans,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=a.window,
            global_attn_indexes=a.global_blocks,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=a.out_chans,
            image_embedding_size=(a.grid, a.grid),
            input_image_size=(a.image_size, a.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=a.masks,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=a.out_chans, mlp_dim=a.mlp_dim, num_heads=a.decoder_heads
            ),
            transformer_dim=a.out_chans,
            iou_head_depth=3,
            iou_head_hidden_dim=a.out_chans,
        ),
        pixel_mean=[123.675, 116.28, 103.53] if imagenet else [0.0] * 3,
        pixel_std=[58.395, 57.12, 57.375] if imagenet else [1.0] * 3,
    )
    if a.adapters:
        add_adapters(sam.image_encoder)
    return sam.eval()
