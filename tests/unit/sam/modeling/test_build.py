from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from skimage.transform import resize

from aslseg.resources import small_sam
from aslseg.sam.modeling.architecture import SMALL, Architecture, build
from aslseg.sam.modeling.build import MASK_LOGIT_LIMIT, SAMModel, base_path, ellipses, load
from aslseg.settings import Settings


def test_small_sam_is_small() -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(SMALL).parameters())
    assert parameters < 3_000_000
    assert SMALL.image_size <= 256
    assert (SMALL.grid, 4 * SMALL.grid) == (24, 96)


def test_architecture_survives_json() -> None:
    assert Architecture.from_metadata(json.loads(json.dumps(SMALL.to_metadata()))) == SMALL


def test_a_file_of_ours_from_before_the_setting_takes_the_ellipse_of_a_box() -> None:
    values = SMALL.with_conventions(box_mask=False).to_metadata()
    assert not Architecture.from_metadata(values).conventions.box_mask
    del values["box_mask"]
    assert Architecture.from_metadata(values).conventions.box_mask


def test_the_ellipse_in_a_box_touches_its_sides_and_stays_inside() -> None:
    boxes = torch.tensor([[16.0, 32, 48, 40], [0, 0, 64, 64], [20, 20, 20, 20]])
    found = ellipses(boxes, 32, 2)
    assert found.shape == (3, 32, 32)
    inside = found > 0.5
    rows, columns = torch.where(inside[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 19, 8, 23)
    assert inside.sum((1, 2))[:2].tolist() == pytest.approx([math.pi * 8 * 2, math.pi * 16 * 16], rel=0.1)
    assert inside[2].sum() <= 4  # no size: still a place
    assert found[2].flatten().argmax() in (9 * 32 + 9, 9 * 32 + 10, 10 * 32 + 9, 10 * 32 + 10)


def test_load_gives_back_the_same_model(tiny: SAMModel, tiny_file: Path, settings: Settings) -> None:
    again = load(tiny_file, settings)
    assert again.architecture == tiny.architecture
    assert again.fingerprint == load(tiny_file, settings).fingerprint != tiny.fingerprint
    slices = torch.rand(2, 40, 30)
    with torch.no_grad():
        assert torch.equal(again.encode(slices), tiny.encode(slices))


@pytest.mark.parametrize("shape", [(64, 64), (64, 48), (33, 64), (128, 96), (20, 17)])
def test_preprocessing_fills_the_frame_and_pads_bottom_and_right(tiny: SAMModel, shape: tuple[int, int]) -> None:
    rows, columns = tiny.input_shape(shape)
    assert max(rows, columns) == 64
    seen = tiny.preprocess(torch.full((1, *shape), 0.5))
    level = (0.5 * 255 - tiny.sam.pixel_mean) / tiny.sam.pixel_std
    torch.testing.assert_close(seen[0, :, :rows, :columns], level.expand(3, rows, columns))
    assert not seen[:, :, rows:].any()
    assert not seen[:, :, :, columns:].any()


def test_preprocessing_is_exact_at_the_models_own_size(tiny: SAMModel) -> None:
    slices = torch.rand(1, 64, 40)
    seen = tiny.preprocess(slices)[:, :, :, :40] * tiny.sam.pixel_std + tiny.sam.pixel_mean
    torch.testing.assert_close(seen, (slices[:, None] * 255).expand(1, 3, 64, 40), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (64, 40), (24, 64), (128, 80)])
def test_low_res_and_back_keeps_a_rectangle_in_place(tiny: SAMModel, shape: tuple[int, int]) -> None:
    mask = np.zeros(shape, np.float32)
    step = shape[0] // 8
    mask[2 * step : 4 * step, step : 3 * step] = 1
    low = tiny.to_low_res(torch.from_numpy(mask)[None])
    back = tiny.to_slices(low[:, None], shape)[0, 0].numpy()
    overlap = ((back > 0.5) & (mask > 0)).sum() / ((back > 0.5) | (mask > 0)).sum()
    assert overlap > 0.85
    away = np.ones(shape, bool)
    away[step : 5 * step, : 4 * step] = False
    assert np.abs(back[away]).max() < 1e-4


def test_mask_prompts_are_logits_or_probabilities(tiny: SAMModel) -> None:
    p = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 2, 2)
    logits = tiny.mask_prompt(p).flatten()
    limit = MASK_LOGIT_LIMIT
    torch.testing.assert_close(logits, torch.tensor([-limit, -np.log(3).item(), 0.0, limit]), atol=1e-3, rtol=0)
    architecture = tiny.architecture.with_conventions(mask_prompt="probabilities")
    assert torch.equal(SAMModel(tiny.sam, architecture).mask_prompt(p)[:, 0], p)


@pytest.mark.parametrize("shape", [(64, 64), (64, 50), (37, 64)])
@pytest.mark.parametrize("kind", ["points", "box", "mask", "box+points", "all"])
def test_equal_to_segment_anythings_predictor(tiny: SAMModel, shape: tuple[int, int], kind: str) -> None:
    """At the model's own size no resampling differs, and 8-bit greys are exact in both."""
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, shape).astype(np.uint8)
    predictor = SamPredictor(tiny.sam)
    predictor.set_image(np.repeat(grey[..., None], 3, 2))
    points = np.array([[10.0, 20.0], [30.0, 12.0]])
    labels = np.array([1, 0])
    box = np.array([5.0, 8.0, 40.0, 30.0])
    mask = rng.normal(size=(1, 32, 32)).astype(np.float32)
    use_points, use_box, use_mask = (
        kind in ("points", "box+points", "all"),
        "box" in kind or kind == "all",
        "ma" in kind,
    )
    use_mask = kind in ("mask", "all")
    expected, iou, low = predictor.predict(
        points if use_points else None,
        labels if use_points else None,
        box if use_box else None,
        mask if use_mask else None,
        multimask_output=True,
        return_logits=True,
    )
    with torch.no_grad():
        embeddings = tiny.encode(grey[None].astype(np.float32) / 255)
        got_low, got_iou = tiny.decode(
            embeddings,
            (torch.tensor(points)[None].float(), torch.tensor(labels)[None]) if use_points else None,
            torch.tensor(box)[None].float() if use_box else None,
            torch.tensor(mask)[None] if use_mask else None,
            multimask=True,
        )
        got = tiny.to_slices(got_low, shape)
    np.testing.assert_allclose(got_low[0], low, atol=1e-4)
    np.testing.assert_allclose(got_iou[0], iou, atol=1e-4)
    np.testing.assert_allclose(got[0], expected, atol=1e-4)


def test_prompts_of_several_slices_share_a_call(tiny: SAMModel) -> None:
    with torch.no_grad():
        embeddings = tiny.encode(torch.rand(2, 64, 64))
        boxes = torch.tensor([[4.0, 4, 30, 30], [10, 20, 50, 60], [0, 0, 64, 64]])
        together, _ = tiny.decode(embeddings[[0, 1, 1]], boxes=boxes)
        for n, slice_ in enumerate((0, 1, 1)):
            alone, _ = tiny.decode(embeddings[slice_ : slice_ + 1], boxes=boxes[n : n + 1])
            torch.testing.assert_close(together[n], alone[0], atol=1e-5, rtol=1e-4)


def test_squashing_models_fill_the_frame(tiny: SAMModel) -> None:
    model = SAMModel(tiny.sam, tiny.architecture.with_conventions(resize="squash"))
    assert model.input_shape((20, 50)) == (64, 64)
    assert model.scale((32, 128)) == (0.5, 2.0)


def test_medsam_takes_each_slice_from_0_to_1(tiny: SAMModel) -> None:
    architecture = tiny.architecture.with_conventions(resize="squash", interpolation="bicubic", scaling="minmax")
    model = SAMModel(build(architecture), architecture)
    slices = torch.rand(2, 64, 64) * torch.tensor([0.2, 0.5]).view(2, 1, 1) + 0.3
    seen = model.preprocess(slices)
    low, high = slices.amin((1, 2), keepdim=True), slices.amax((1, 2), keepdim=True)
    torch.testing.assert_close(seen, ((slices - low) / (high - low))[:, None].expand(2, 3, 64, 64))
    # as in MedSAM_Inference: cubic without antialiasing when a slice is enlarged, then its least value to 0
    i, j = torch.meshgrid(torch.arange(30) / 4, torch.arange(50) / 5, indexing="ij")
    small = (0.4 + 0.2 * torch.sin(i) * torch.cos(j))[None]
    seen = model.preprocess(small)
    assert seen.shape == (1, 3, 64, 64)
    assert float(seen.min()) >= 0
    assert float(seen.max()) <= 1
    cubic = resize(small[0].numpy(), (64, 64), order=3, mode="edge", anti_aliasing=False)
    expected = (cubic - small.min().item()) / (small.max() - small.min()).item()
    assert np.abs(seen[0, 0].numpy() - expected).mean() < 0.01
    assert torch.equal(model.preprocess(torch.full((1, 64, 64), 0.7)), torch.zeros(1, 3, 64, 64))


def test_sam_med2d_takes_the_nearest_pixel(tiny: SAMModel) -> None:
    architecture = tiny.architecture.with_conventions(resize="squash", interpolation="nearest")
    seen = SAMModel(tiny.sam, architecture).preprocess(torch.arange(128 * 96).view(1, 128, 96) / (128 * 96))
    rows, columns = np.floor(np.arange(64) * 2).astype(int), np.floor(np.arange(64) * 1.5).astype(int)
    grey = (np.arange(128 * 96).reshape(128, 96) / (128 * 96))[rows][:, columns] * 255
    back = seen * tiny.sam.pixel_std + tiny.sam.pixel_mean
    np.testing.assert_allclose(back[0, 0].numpy(), grey, atol=1e-3)


def test_base_path_is_the_setting_or_the_one_that_ships() -> None:
    assert base_path(Settings()) == small_sam()
    assert base_path(Settings(sam_checkpoint="/x/sam.pth")) == Path("/x/sam.pth")
