from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from segment_anything.build_sam import sam_model_registry

from aslseg.errors import BadWeightsError
from aslseg.sam.architecture import Architecture, build
from aslseg.sam.build import SAMModel, load
from aslseg.sam.checkpoints import describe, read, resized
from aslseg.settings import Settings

VIT_B_PARAMETERS = 93_735_472
MED2D_PARAMETERS = 90_737_200
ADAPTER_SHAPES = {
    "norm.weight": (768,),
    "norm.bias": (768,),
    "channel.0.weight": (192, 768),
    "channel.2.weight": (768, 192),
    "spatial.0.weight": (768, 768, 3, 3),
    "spatial.2.weight": (768, 768, 4, 4),
}
VIT_B = Architecture(1024, 16, 768, 12, 12, 14, (2, 5, 8, 11), 256, 2048, 8)


@pytest.fixture(scope="module")
def vit_b() -> dict[str, torch.Tensor]:
    """Random weights under the official keys; expanded zeros, so that they take no memory."""
    with torch.device("meta"):
        shapes = sam_model_registry["vit_b"]().state_dict()
    return {k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}


def sparse_save(state: dict[str, torch.Tensor], path: Path, **more: object) -> Path:
    """Expanded tensors keep their one-element storage on disk, so even a ViT-B file is small."""
    torch.save({"model": state, **more} if more or path.stem.startswith("sam-med2d") else state, path)
    return path


def test_sam_vit_b_is_recognised(vit_b: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = sparse_save(vit_b, tmp_path / "sam_vit_b_01ec64.pth")
    assert len(vit_b) == 314
    assert describe(path) == {
        "kind": "sam_vit_b",
        "image_size": 1024,
        "adapters": False,
        "parameters": VIT_B_PARAMETERS,
        "missing": [],
        "unexpected": [],
    }
    assert read(path).architecture == VIT_B


@pytest.mark.parametrize(("name", "kind"), [("vit_l", "sam_vit_l"), ("vit_h", "sam_vit_h")])
def test_larger_encoders_are_recognised(name: str, kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = sam_model_registry[name]().state_dict()
    path = sparse_save({k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}, tmp_path / "any.pth")
    found = describe(path)
    assert (found["kind"], found["image_size"], found["missing"], found["unexpected"]) == (kind, 1024, [], [])


@pytest.mark.parametrize("form", ["name", "training file", "data parallel"])
def test_medsam_is_recognised(form: str, vit_b: dict[str, torch.Tensor], tmp_path: Path) -> None:
    if form == "name":
        path = sparse_save(vit_b, tmp_path / "medsam_vit_b.pth")
    elif form == "training file":
        path = sparse_save(vit_b, tmp_path / "latest.pth", optimizer={"state": {}}, epoch=3)
    else:
        parallel = {f"module.{k}": v for k, v in vit_b.items()}
        path = sparse_save(parallel, tmp_path / "latest.pth", optimizer={"state": {}}, epoch=3)
    found = read(path)
    assert found.kind == "medsam"
    assert not found.missing
    assert not found.unexpected
    assert (found.architecture.resize, found.architecture.scaling) == ("squash", "unit")


def med2d(vit_b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return resized(vit_b, replace(VIT_B, image_size=256))


def test_sam_med2d_with_adapters_is_described_and_refused(
    vit_b: dict[str, torch.Tensor], tmp_path: Path, settings: Settings
) -> None:
    state = med2d(vit_b)
    for block in range(12):
        for key, shape in ADAPTER_SHAPES.items():
            state[f"image_encoder.blocks.{block}.Adapter.{key}"] = torch.zeros(()).expand(shape)
    assert len(state) == 386
    path = sparse_save(state, tmp_path / "sam-med2d_b.pth")
    assert describe(path) == {
        "kind": "sam_med2d",
        "image_size": 256,
        "adapters": True,
        "parameters": 271_241_776,
        "missing": [],
        "unexpected": [],
    }
    with pytest.raises(BadWeightsError, match=r"adapters in 12 blocks.*give a SAM-Med2D file without adapters"):
        load(path, settings)


def test_sam_med2d_without_adapters_takes_probabilities(vit_b: dict[str, torch.Tensor], tmp_path: Path) -> None:
    found = read(sparse_save(med2d(vit_b), tmp_path / "sam-med2d_b.pth"))
    assert (found.kind, found.adapters, found.parameters) == ("sam_med2d", 0, MED2D_PARAMETERS)
    assert found.architecture == replace(
        VIT_B, image_size=256, mask_prompt="probabilities", resize="squash", scaling="imagenet"
    )


def test_adapterless_sam_med2d_loads_and_answers(tmp_path: Path, settings: Settings) -> None:
    """The one test with real ViT-B weights: 256 px, random."""
    architecture = replace(VIT_B, image_size=256, mask_prompt="probabilities", resize="squash")
    torch.manual_seed(0)
    state = build(architecture).state_dict()
    path = tmp_path / "sam-med2d_b.pth"
    torch.save({"model": state}, path)
    model = load(path, settings)
    path.unlink()
    assert model.architecture == architecture
    with torch.no_grad():
        low, iou = model.decode(model.encode(torch.rand(1, 60, 80)), boxes=torch.tensor([[10.0, 10, 90, 90]]))
    assert low.shape == (1, 1, 64, 64)
    assert torch.isfinite(low).all()
    assert torch.isfinite(iou).all()


def test_missing_and_unexpected_keys_are_reported(tiny: SAMModel, tmp_path: Path, settings: Settings) -> None:
    state = tiny.sam.state_dict()
    gone, odd = "mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"
    del state[gone]
    state["extra.weight"] = torch.zeros(3)
    state[odd] = torch.zeros(1, 7)
    path = tmp_path / "part.pth"
    torch.save(state, path)
    found = describe(path)
    assert sorted(found["missing"]) == sorted([gone, odd])
    assert sorted(found["unexpected"]) == sorted(["extra.weight", odd])
    with pytest.raises(BadWeightsError, match=r"2 keys .* missing, 2 keys .* unexpected"):
        load(path, settings)


def test_plain_state_dict_of_any_size_is_recognised(tiny: SAMModel, tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": tiny.sam.state_dict()}, path)
    assert read(path).architecture == replace(tiny.architecture, decoder_heads=8)


class Marker:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["whole", "beside the weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_unrun(place: str, zipped: bool, tiny: SAMModel, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    content = Marker(marker) if place == "whole" else {"model": tiny.sam.state_dict(), "optimizer": Marker(marker)}
    path = tmp_path / "bad.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadWeightsError, match="nothing in it was executed"):
        describe(path)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 3, 1000, 0.5, 0.99])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_truncated_files_say_so(keep: float, ending: str, tiny: SAMModel, tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{ending}"
    if ending == "pth":
        torch.save(tiny.sam.state_dict(), path)
    else:
        path.write_bytes(tiny_file.read_bytes())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 or keep == 0 else keep * len(whole))])
    with pytest.raises(BadWeightsError, match=r"cut\.\w+.*(again|retrain|anew)"):
        describe(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict"),
        ({"model": {"a": 1}}, "expected a state dict"),
        ({"weight": torch.zeros(2)}, "not a SAM"),
        ({}, "not a SAM"),
    ],
)
def test_other_files_are_not_sams(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(BadWeightsError, match=message):
        describe(path)


def test_text_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "readme.pth"
    path.write_text("hello, not weights")
    with pytest.raises(BadWeightsError, match=r"readme\.pth"):
        describe(path)
    with pytest.raises(BadWeightsError, match="no such file"):
        describe(tmp_path / "none.pth")


def test_a_model_of_another_kind_is_refused(tiny_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "ssl.safetensors"
    save_file(load_file(tiny_file), path, metadata={"aslseg": json.dumps({"kind": "ssl"})})
    with pytest.raises(BadWeightsError, match="'ssl' model, expected 'sam'"):
        describe(path)


def test_resized_changes_positions_only_and_is_exact_where_nothing_changes(tiny: SAMModel) -> None:
    state = tiny.sam.state_dict()
    same = resized(state, tiny.architecture)
    assert all(same[k] is state[k] for k in state)
    larger = replace(tiny.architecture, image_size=96)
    moved = resized(state, larger)
    build(larger).load_state_dict(moved, strict=True)
    changed = {k for k in state if moved[k] is not state[k]}
    assert changed == {
        "image_encoder.pos_embed",
        "image_encoder.blocks.1.attn.rel_pos_h",
        "image_encoder.blocks.1.attn.rel_pos_w",
    }
