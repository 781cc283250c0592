from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aslseg.errors import BadWeightsError
from aslseg.sam.cfr import canvas
from aslseg.sam.modeling.build import SAMModel, load
from aslseg.sam.modeling.checkpoints import describe, read
from aslseg.sam.modeling.lora import add_lora, merge_lora, merged_cfr
from aslseg.settings import Settings


def changed_lora(model: SAMModel, rank: int = 4) -> list[torch.nn.Parameter]:
    """LoRA that has learned something: B is zero only at the start."""
    added = add_lora(model.sam.image_encoder, rank, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in added:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return added


def test_it_changes_nothing_at_first(tiny: SAMModel) -> None:
    slices = torch.rand(1, 64, 48)
    with torch.no_grad():
        before = tiny.encode(slices)
        added = add_lora(tiny.sam.image_encoder, 4, torch.Generator().manual_seed(0))
        torch.testing.assert_close(tiny.encode(slices), before, atol=1e-6, rtol=0)
    assert sum(p.numel() for p in added) == 2 * 4 * 4 * 32  # blocks, (A, B of q, v), rank, channels


def test_queries_and_values_get_b_a_x_and_keys_nothing(tiny: SAMModel) -> None:
    layer = tiny.sam.image_encoder.blocks[1].attn.qkv
    x = torch.randn(5, 32)
    with torch.no_grad():
        q, k, v = layer(x).chunk(3, -1)
        changed_lora(tiny)
        lora = layer.parametrizations.weight[0]
        new_q, new_k, new_v = layer(x).chunk(3, -1)
        torch.testing.assert_close(new_q, q + (x @ lora.a_q.T) @ lora.b_q.T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(new_v, v + (x @ lora.a_v.T) @ lora.b_v.T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(new_k, k, atol=1e-6, rtol=0)


def test_merged_weights_give_the_same_answer(tiny: SAMModel) -> None:
    names = set(tiny.sam.state_dict())
    slices = torch.rand(2, 64, 48)
    with torch.no_grad():
        plain = tiny.encode(slices)
        changed_lora(tiny)
        separate = tiny.encode(slices)
        merge_lora(tiny.sam.image_encoder)
        torch.testing.assert_close(tiny.encode(slices), separate, atol=1e-5, rtol=1e-5)
    assert (separate - plain).abs().max() > 1e-2
    assert set(tiny.sam.state_dict()) == names


def cfr_file(model: SAMModel, labels: int, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as CFR saves it, and the state dict that it stands for, worked out block by block."""
    generator = torch.Generator().manual_seed(3)
    stitched = canvas.for_canvases(model, labels, seed=5).sam.state_dict()
    whole = {k: v.clone() for k, v in stitched.items()}
    saved = {k: v for k, v in stitched.items() if k.startswith(("prompt_encoder.", "mask_decoder."))}
    for block in range(2):
        key = f"image_encoder.blocks.{block}.attn.qkv.weight"
        for part, rows in ((0, slice(0, 32)), (1, slice(64, 96))):
            a, b = torch.randn(4, 32, generator=generator), 0.1 * torch.randn(32, 4, generator=generator)
            saved[f"w_a_{2 * block + part:03d}"], saved[f"w_b_{2 * block + part:03d}"] = a, b
            whole[key][rows] += b @ a
    torch.save(saved, path)
    return path, whole


@pytest.fixture
def cfr(tiny: SAMModel, tiny_file: Path, tmp_path: Path, settings: Settings) -> tuple[Path, dict, Settings]:
    path, whole = cfr_file(tiny, 2, tmp_path / "epoch_159.pth")
    return path, whole, settings.model_copy(update={"sam_base": str(tiny_file)})


def test_cfrs_files_are_recognised_and_merged(cfr: tuple[Path, dict, Settings], tiny: SAMModel) -> None:
    path, whole, settings = cfr
    found = read(path, settings)
    assert (found.kind, found.lora, found.missing, found.unexpected) == ("cfr_lora", 4, (), ())
    assert found.architecture == replace(tiny.architecture, masks=2, canvas=True).with_conventions(scaling="zscore")
    for key, value in whole.items():
        torch.testing.assert_close(found.state[key], value, atol=1e-6, rtol=1e-6)
    model = canvas.load(path, settings)
    assert model.metadata["lora_base_sha256"]
    torch.testing.assert_close(model.sam.state_dict(), whole, atol=1e-6, rtol=1e-6)


def test_cfrs_files_need_their_base_and_take_no_prompts(cfr: tuple[Path, dict, Settings], tiny: SAMModel) -> None:
    path, _, settings = cfr
    with pytest.raises(BadWeightsError, match="takes no prompts"):
        load(path, settings)
    alone = settings.model_copy(update={"sam_base": ""})
    with pytest.raises(BadWeightsError, match="set sam_base"):
        canvas.load(path, alone)


def test_cfr_of_vit_b_is_described_without_its_base(tmp_path: Path) -> None:
    zero = torch.zeros(())
    state = {f"w_a_{n:03d}": zero.expand(4, 768) for n in range(24)}
    state |= {f"w_b_{n:03d}": zero.expand(768, 4) for n in range(24)}
    state["mask_decoder.mask_tokens.weight"] = zero.expand(2, 256)
    torch.save(state, tmp_path / "cfr.pth")
    found = describe(tmp_path / "cfr.pth")
    assert (found["kind"], found["recognised_by"], found["lora"]) == ("cfr_lora", "its LoRA weights", 4)
    assert (found["image_size"], found["preprocessing"]["scaling"]) == (1024, "zscore")
    assert "image_encoder.pos_embed" in found["missing"]


@pytest.mark.parametrize("lost", [["w_a_001"], ["w_b_002"], ["w_a_002", "w_b_002", "w_a_003", "w_b_003"]])
def test_cfrs_files_that_miss_some_of_their_lora_are_refused(cfr: tuple[Path, dict, Settings], lost: list[str]) -> None:
    path, _, settings = cfr
    saved = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in saved.items() if k not in lost}, path)
    with pytest.raises(BadWeightsError, match=r"epoch_159.pth: 1 of 2 blocks have LoRA weights"):
        canvas.load(path, settings)


def test_lora_for_another_sam_is_refused(cfr: tuple[Path, dict, Settings], tiny: SAMModel) -> None:
    state = tiny.sam.state_dict()
    with pytest.raises(KeyError):
        merged_cfr(state, {"w_a_008": torch.zeros(4, 32), "w_b_008": torch.zeros(32, 4)})
    with pytest.raises(ValueError, match="LoRA of 16 channels on a SAM of 32"):
        merged_cfr(state, {"w_a_000": torch.zeros(4, 16), "w_b_000": torch.zeros(16, 4)})
