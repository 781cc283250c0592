"""SAM-Med2D's adapters against a second writing of docs/science.md §3.1, on bare tensors."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from torch import Tensor

from aslseg.compute.weights import save_weights
from aslseg.sam.modeling.architecture import VIT_B, Architecture, build
from aslseg.sam.modeling.build import SAMModel, load
from aslseg.sam.modeling.checkpoints import read
from aslseg.sam.modeling.med2d_adapter import Med2dAdapter, add_adapters
from aslseg.settings import Settings

TINY_MED2D = Architecture(64, 8, 32, 2, 2, 4, (1,), 32, 64).with_conventions(
    mask_prompt="probabilities", resize="squash", interpolation="nearest"
)


def adapter(u: Tensor, w: dict[str, Tensor]) -> Tensor:
    """out = LayerNorm(v + v_s), v_s = ReLU(ConvT(ReLU(Conv(g v)))), g = sigmoid(W2 ReLU(W1 GAP(v)))."""
    v = u.permute(0, 3, 1, 2)
    g = torch.sigmoid(F.relu(v.mean((2, 3)) @ w["channel.0.weight"].T) @ w["channel.2.weight"].T)
    down = F.relu(F.conv2d(v * g[:, :, None, None], w["spatial.0.weight"], stride=2, padding=1))
    up = F.relu(F.conv_transpose2d(down, w["spatial.2.weight"], stride=2, padding=1))
    x = (v + up).permute(0, 2, 3, 1)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * w["norm.weight"] + w["norm.bias"]


def test_the_adapter_is_sam_med2ds() -> None:
    torch.manual_seed(0)
    module = Med2dAdapter(16)
    with torch.no_grad():
        module.norm.weight.uniform_(0.5, 2)
        module.norm.bias.normal_()
        u = torch.randn(2, 6, 4, 16)
        torch.testing.assert_close(module(u), adapter(u, module.state_dict()), atol=1e-5, rtol=1e-5)


def test_sizes_and_names_are_those_of_the_official_file() -> None:
    """15,042,048 parameters a block, 271,241,776 together at 256 px, 386 keys."""
    with torch.device("meta"):
        sam = build(replace(VIT_B, image_size=256, adapters=True))
    state = sam.state_dict()
    assert len(state) == 386
    assert sum(p.numel() for p in sam.parameters()) == 271_241_776
    block = {k.split("Adapter.")[1]: tuple(v.shape) for k, v in state.items() if "blocks.7.Adapter." in k}
    assert block == {
        "norm.weight": (768,),
        "norm.bias": (768,),
        "channel.0.weight": (192, 768),
        "channel.2.weight": (768, 192),
        "spatial.0.weight": (768, 768, 3, 3),
        "spatial.2.weight": (768, 768, 4, 4),
    }
    assert sum(int(np.prod(s)) for s in block.values()) == 15_042_048


def test_a_block_adds_the_adapter_to_its_mlp() -> None:
    torch.manual_seed(0)
    encoder = build(TINY_MED2D).image_encoder
    add_adapters(encoder, torch.Generator().manual_seed(1))
    x = torch.randn(2, 8, 8, 32)
    with torch.no_grad():
        for block in encoder.blocks:
            u = block.norm1(x)
            if block.window_size:
                parts, padded = window_partition(u, block.window_size)
                u = window_unpartition(block.attn(parts), block.window_size, padded, (8, 8))
            else:
                u = block.attn(u)
            y = x + u
            u = block.norm2(y)
            expected = y + block.mlp.lin2(F.gelu(block.mlp.lin1(u))) + adapter(u, block.Adapter.state_dict())
            torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_are_kaiming_normal_by_fan_out() -> None:
    encoder = build(replace(TINY_MED2D, embed_dim=128)).image_encoder
    add_adapters(encoder, torch.Generator().manual_seed(1))
    spatial, channel = encoder.blocks[0].Adapter.spatial, encoder.blocks[0].Adapter.channel
    for weight, fan_out in ((spatial[0].weight, 128 * 9), (channel[0].weight, 32), (channel[2].weight, 128)):
        assert float(weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    again = build(replace(TINY_MED2D, embed_dim=128)).image_encoder
    add_adapters(again, torch.Generator().manual_seed(1))
    assert torch.equal(again.blocks[1].Adapter.spatial[2].weight, encoder.blocks[1].Adapter.spatial[2].weight)


def test_copies_are_independent() -> None:
    first = build(replace(TINY_MED2D, adapters=True))
    second = copy.deepcopy(first)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        before = first.image_encoder(x)
        for p in second.image_encoder.blocks[0].Adapter.parameters():
            p.zero_()
        assert torch.equal(first.image_encoder(x), before)
        assert not torch.equal(second.image_encoder(x), before)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_saved_and_loaded_again(ending: str, tmp_path: Path, settings: Settings) -> None:
    architecture = replace(TINY_MED2D, adapters=True)
    torch.manual_seed(0)
    model = SAMModel(build(architecture), architecture)
    path = tmp_path / f"med2d.{ending}"
    if ending == "pth":
        torch.save({"model": model.sam.state_dict()}, path)
        settings = settings.model_copy(update={"sam_kind": "sam_med2d"})
        architecture = architecture.with_conventions(multimask="always")
    else:
        save_weights(path, model.sam.state_dict(), model.metadata)
    assert read(path, settings).adapters == 2
    again = load(path, settings)
    # the decoder's heads cannot be seen in its shapes
    assert again.architecture == architecture
    slices = torch.rand(1, 40, 90)
    with torch.no_grad():
        assert torch.equal(again.encode(slices), model.encode(slices))
