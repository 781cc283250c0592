"""The sizes of a SAM, and SAMs of these sizes built from the modules of segment-anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from aslseg.sam.modeling.conventions import OURS, SAM, Conventions
from aslseg.sam.modeling.med2d_adapter import add_adapters


@dataclass(frozen=True)
class Architecture:
    """Everything that is needed to build a SAM without weights, and how it is asked.

    Attributes:
        image_size: Edge of the square input in pixels.
        patch_size: Edge of a token in pixels.
        embed_dim, depth, heads, window, global_blocks: The image encoder.
        out_chans: Channels of the image embedding, prompt encoder and decoder.
        mlp_dim: Width of the decoder's MLPs.
        decoder_heads: Attention heads of the decoder.
        masks: Masks offered for an ambiguous prompt; there is one token more, for the single answer.
        canvas: Whether it segments whole canvases (:mod:`aslseg.sam.cfr.canvas`) instead of answering prompts: there is
            then one mask per label, and the first token is the background.
        adapters: Whether the encoder's blocks carry SAM-Med2D's adapters.
        conventions: How slices and prompts are shown to it.
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
    conventions: Conventions = SAM

    @classmethod
    def from_metadata(cls, values: dict[str, Any]) -> Architecture:
        """The inverse of :meth:`to_metadata` after JSON. Our files that do not say otherwise have ``box_mask``."""
        values = {"box_mask": True, **values, "global_blocks": tuple(values["global_blocks"])}
        asked = {f.name: values.pop(f.name) for f in fields(Conventions) if f.name in values}
        return cls(**values, conventions=Conventions(**asked))

    def to_metadata(self) -> dict[str, Any]:
        """All values by name, those of the conventions beside the others, as model files hold them."""
        values = asdict(self)
        return values | values.pop("conventions")

    def with_conventions(self, **changes: Any) -> Architecture:
        """The same SAM, shown slices and prompts in another way."""
        return replace(self, conventions=replace(self.conventions, **changes))

    @property
    def grid(self) -> int:
        """Tokens along one edge."""
        return self.image_size // self.patch_size


SMALL = Architecture(conventions=OURS)
VIT_B = Architecture(1024, 16, 768, 12, 12, 14, (2, 5, 8, 11), 256, 2048)
VIT_L = Architecture(1024, 16, 1024, 24, 16, 14, (5, 11, 17, 23), 256, 2048)
VIT_H = Architecture(1024, 16, 1280, 32, 16, 14, (7, 15, 23, 31), 256, 2048)


def build(architecture: Architecture) -> Sam:
    """A SAM with random weights."""
    a = architecture
    imagenet = a.conventions.scaling == "imagenet"
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
