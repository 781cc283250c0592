from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.build_sam import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from aslseg.compute.weights import save_weights
from aslseg.errors import BadSettingsError, BadWeightsError
from aslseg.files import sha256
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.modeling.build import SAMModel, load
from aslseg.sam.modeling.checkpoints import describe, read, resized
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
MEDSAM = VIT_B.with_conventions(resize="squash", interpolation="bicubic", scaling="minmax", multimask="never")
MED2D = replace(VIT_B, image_size=256).with_conventions(
    mask_prompt="probabilities",
    multimask="always",
    resize="squash",
    interpolation="nearest",
)


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


@pytest.fixture(scope="module")
def small_vit_b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Sam]]:
    """ViT-B at 256 px with random weights, put together as segment-anything does at 1024, and its file."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        depth=12,
        embed_dim=768,
        img_size=256,
        mlp_ratio=4,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_heads=12,
        patch_size=16,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=[2, 5, 8, 11],
        window_size=14,
        out_chans=256,
    )
    prompts = PromptEncoder(embed_dim=256, image_embedding_size=(16, 16), input_image_size=(256, 256), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    sam = Sam(encoder, prompts, decoder, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]).eval()
    path = tmp_path_factory.mktemp("vit_b") / "any.pth"
    torch.save({"model": sam.state_dict()}, path)
    yield path, sam
    path.unlink()


def compare_with_predictor(model: SAMModel, predictor: SamPredictor, shape: tuple[int, int]) -> None:
    """Points, box, mask and all of them: logits on the slice, low-res logits and predicted IoU, to 1e-5."""
    model.bf16 = False
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, shape).astype(np.uint8)
    if max(shape) == model.image_size:
        predictor.set_image(np.repeat(grey[..., None], 3, 2))
    else:  # set_image rounds a resized image to 8 bits, apply_image_torch looks at the wrong axes
        rgb = torch.from_numpy(grey)[None, None].expand(1, 3, -1, -1).float()
        size = predictor.transform.get_preprocess_shape(*shape, model.image_size)
        predictor.set_torch_image(
            torch.nn.functional.interpolate(rgb, size, mode="bilinear", align_corners=False, antialias=True), shape
        )
    points = np.array([[0.3 * shape[1], 0.4 * shape[0]], [0.8 * shape[1], 0.1 * shape[0]]])
    labels, box = np.array([1, 0]), np.array([0.1 * shape[1], 0.2 * shape[0], 0.7 * shape[1], 0.6 * shape[0]])
    low = 4 * model.architecture.grid
    mask = rng.normal(size=(1, low, low)).astype(np.float32)
    two = np.array(model.scale(shape))
    with torch.no_grad():
        embeddings = model.encode(grey[None].astype(np.float32) / 255)
        torch.testing.assert_close(embeddings, predictor.features, atol=1e-5, rtol=1e-5)
        for use in ("points", "box", "mask", "points box mask"):
            told = (points, labels) if "points" in use else (None, None)
            expected = predictor.predict(
                *told, box if "box" in use else None, mask if "mask" in use else None, return_logits=True
            )
            logits, iou = model.decode(
                embeddings,
                (torch.tensor(points * two)[None].float(), torch.tensor(labels)[None]) if "points" in use else None,
                torch.tensor(box * np.tile(two, 2))[None].float() if "box" in use else None,
                torch.tensor(mask)[None] if "mask" in use else None,
                multimask=True,
            )
            got = (model.to_slices(logits, shape)[0], iou[0], logits[0])
            for ours, theirs in zip(got, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_sam_vit_b_is_recognised(vit_b: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = sparse_save(vit_b, tmp_path / "sam_vit_b_01ec64.pth")
    assert len(vit_b) == 314
    assert describe(path) == {
        "kind": "sam_vit_b",
        "recognised_by": "its shapes and sam_vit_b in its name",
        "sha256": sha256(path),
        "image_size": 1024,
        "adapters": False,
        "lora": 0,
        "parameters": VIT_B_PARAMETERS,
        "preprocessing": {"resize": "longest", "interpolation": "bilinear", "scaling": "imagenet"},
        "mask_prompt": "logits",
        "objects": [],
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


@pytest.mark.parametrize("form", ["weights", "training file", "data parallel"])
def test_medsam_is_recognised_by_its_name(form: str, vit_b: dict[str, torch.Tensor], tmp_path: Path) -> None:
    if form == "weights":
        path = sparse_save(vit_b, tmp_path / "MedSAM_vit_b.pth")
    elif form == "training file":
        path = sparse_save(vit_b, tmp_path / "medsam_model_latest.pth", optimizer={"state": {}}, epoch=3)
    else:
        parallel = {f"module.{k}": v for k, v in vit_b.items()}
        path = sparse_save(parallel, tmp_path / "medsam_model_best.pth", optimizer={"state": {}}, epoch=3)
    found = read(path)
    assert found.kind == "medsam"
    assert not found.missing
    assert not found.unexpected
    assert found.architecture == MEDSAM


def test_what_may_be_sam_or_medsam_is_not_guessed(
    vit_b: dict[str, torch.Tensor], tmp_path: Path, settings: Settings
) -> None:
    path = sparse_save(vit_b, tmp_path / "latest.pth", optimizer={"state": {}}, epoch=3)
    assert describe(path)["kind"] == "sam_vit_b or medsam"
    with pytest.raises(BadWeightsError, match="Set sam_kind to sam or medsam"):
        load(path, settings)
    for kind, expected in (("sam", VIT_B), ("medsam", MEDSAM)):
        found = read(path, settings.model_copy(update={"sam_kind": kind}))
        found.require_loadable()
        assert found.architecture == expected
        assert found.recognised_by == "the setting sam_kind"


def med2d(vit_b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return resized(vit_b, replace(VIT_B, image_size=256))


def with_adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    keys = {f"image_encoder.blocks.{n}.Adapter.{k}": shape for n in range(12) for k, shape in ADAPTER_SHAPES.items()}
    return state | {k: torch.zeros(()).expand(shape) for k, shape in keys.items()}


def test_sam_med2d_with_adapters_is_recognised(vit_b: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = with_adapters(med2d(vit_b))
    assert len(state) == 386
    path = sparse_save(state, tmp_path / "sam-med2d_b.pth")
    assert describe(path) == {
        "kind": "sam_med2d",
        "recognised_by": "its adapters",
        "sha256": sha256(path),
        "image_size": 256,
        "adapters": True,
        "lora": 0,
        "parameters": 271_241_776,
        "preprocessing": {"resize": "squash", "interpolation": "nearest", "scaling": "imagenet"},
        "mask_prompt": "probabilities",
        "objects": [],
        "missing": [],
        "unexpected": [],
    }
    assert read(path).architecture == replace(MED2D, adapters=True)
    del state["image_encoder.blocks.3.Adapter.norm.bias"]
    assert describe(sparse_save(state, path))["missing"] == ["image_encoder.blocks.3.Adapter.norm.bias"]


def test_sam_med2d_without_adapters_takes_probabilities(vit_b: dict[str, torch.Tensor], tmp_path: Path) -> None:
    found = read(sparse_save(med2d(vit_b), tmp_path / "sam-med2d_b.pth"))
    assert (found.kind, found.adapters, found.parameters) == ("sam_med2d", 0, MED2D_PARAMETERS)
    assert found.architecture == MED2D


class Optimiser:
    """Stands for an optimiser of the training program that made a file; here nobody can import it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.state = defaultdict(dict, {torch.nn.Parameter(weight): {"step": 3, "exp_avg": weight}})


@pytest.mark.parametrize("kind", ["torch", "unknown"])
def test_an_optimiser_object_beside_the_weights_is_left_out(kind: str, tiny: SAMModel, tmp_path: Path) -> None:
    """As SAM-Med2D's training saves it."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser: object = Optimiser(torch.ones(3))
    if kind == "torch":
        adam = torch.optim.Adam([weight])
        weight.sum().backward()
        adam.step()
        optimiser = adam
    path = tmp_path / "epoch15_sam.pth"
    torch.save({"model": tiny.sam.float().state_dict(), "optimizer": optimiser}, path)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    found = read(path)
    assert "collections.defaultdict" in found.objects
    assert any(name.endswith(("Adam", "Optimiser")) for name in found.objects)
    assert not found.missing
    assert not found.unexpected
    assert all(torch.equal(found.state[k], v) for k, v in tiny.sam.state_dict().items())


@pytest.mark.slow
def test_official_vit_b_answers_as_segment_anythings_predictor(tmp_path: Path, settings: Settings) -> None:
    """The whole way of an official file: 1024 px, random weights, a slice that has to be resized."""
    torch.manual_seed(0)
    official = sam_model_registry["vit_b"]().eval()
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(official.state_dict(), path)
    model = load(path, settings)
    path.unlink()
    compare_with_predictor(model, SamPredictor(official), (301, 407))


@pytest.mark.parametrize("shape", [pytest.param((256, 201), marks=pytest.mark.slow), (171, 333)])
def test_vit_b_at_256_answers_as_segment_anythings_predictor(
    shape: tuple[int, int], small_vit_b: tuple[Path, Sam], settings: Settings
) -> None:
    path, official = small_vit_b
    model = load(path, settings.model_copy(update={"sam_kind": "sam"}))
    assert model.architecture == replace(VIT_B, image_size=256)
    compare_with_predictor(model, SamPredictor(official), shape)


def test_the_same_file_as_sam_med2d_and_at_another_size(small_vit_b: tuple[Path, Sam], settings: Settings) -> None:
    path, _ = small_vit_b
    model = load(path, settings)
    assert (model.architecture, model.metadata["kind"]) == (MED2D, "sam")
    other = load(path, settings.model_copy(update={"sam_image_size": 128}))
    assert other.architecture == replace(MED2D, image_size=128)
    assert other.fingerprint != model.fingerprint
    with torch.no_grad():
        low, _ = other.decode(other.encode(torch.rand(1, 60, 80)), boxes=torch.tensor([[10.0, 10, 90, 90]]))
    assert low.shape == (1, 1, 32, 32)
    assert torch.isfinite(low).all()
    with pytest.raises(BadSettingsError, match=r"sam_image_size 100.*a multiple of 16"):
        load(path, settings.model_copy(update={"sam_image_size": 100}))


def test_fine_tuned_files_keep_their_size(tiny: SAMModel, tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "ours.safetensors"
    larger = settings.model_copy(update={"sam_image_size": 96})
    save_weights(path, tiny.sam.state_dict(), tiny.metadata)
    assert load(path, larger).image_size == 96
    save_weights(path, tiny.sam.state_dict(), tiny.metadata | {"trained": "full"})
    assert load(path, larger).image_size == 64


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


@pytest.mark.parametrize("lost", ["blocks.11.", "blocks.2.", "pos_embed", "neck.0.weight", "blocks.5.attn.rel_pos_h"])
@pytest.mark.parametrize("med2d_file", [False, True])
def test_whatever_is_lost_of_an_official_encoder_is_listed(
    lost: str, med2d_file: bool, vit_b: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = with_adapters(med2d(vit_b)) if med2d_file else vit_b
    part = {k: v for k, v in whole.items() if f"image_encoder.{lost}" not in k}
    path = sparse_save(part, tmp_path / ("sam-med2d_b.pth" if med2d_file else "sam_vit_b_01ec64.pth"))
    found = describe(path)
    assert (found["kind"], found["image_size"]) == (("sam_med2d", 256) if med2d_file else ("sam_vit_b", 1024))
    assert set(found["missing"]) == whole.keys() - part.keys()
    assert not found["unexpected"]
    with pytest.raises(BadWeightsError, match=f"{len(whole) - len(part)} keys .* missing, no keys unexpected"):
        read(path).require_loadable()


def test_training_files_are_read_by_several_threads_at_once(tiny: SAMModel, tmp_path: Path) -> None:
    path = tmp_path / "epoch15_sam.pth"
    torch.save({"model": tiny.sam.state_dict(), "optimizer": Optimiser(torch.ones(3))}, path)
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: read(path), range(30)))
    assert all(not f.missing and f.objects == found[0].objects for f in found)


def test_plain_state_dict_of_any_size_is_recognised(tiny: SAMModel, tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    torch.save({"state_dict": tiny.sam.state_dict()}, path)
    assert read(path).architecture == replace(tiny.architecture, decoder_heads=8)


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
