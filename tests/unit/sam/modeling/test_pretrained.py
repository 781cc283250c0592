"""The SAM that ships: its manifest is true, it is small, and it helps on scans it has not seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from aslseg.files import sha256
from aslseg.prompts.from_client import parse
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling.architecture import SMALL
from aslseg.sam.modeling.build import SAMModel, base_path, load
from aslseg.sam.modeling.checkpoints import describe, read
from aslseg.sam.predictor.redraw import redraw
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.settings import Settings
from aslseg.volume.intensity import normalise
from aslseg.volume.phantom import make_phantom

SETTINGS = Settings(device="cpu")
PATH = base_path(SETTINGS)
UNSEEN = 991  # no phantom of the pre-training has this seed


@pytest.fixture(scope="module")
def model() -> SAMModel:
    return load(PATH, SETTINGS)


@pytest.fixture(scope="module")
def abdomen() -> tuple[np.ndarray, np.ndarray]:
    volume, classes = make_phantom(UNSEEN, 0)
    return normalise(volume.array, SETTINGS), SETTINGS.label_set.regions(classes)


def mediocre(truth: np.ndarray) -> np.ndarray:
    """A mask that is shifted, smoothed and rough, as softmax probabilities: (i, j, k) float32."""
    rough = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(truth.shape), (6, 6, 2))
    signed = ndimage.distance_transform_edt(truth) - ndimage.distance_transform_edt(~truth)
    return (1 / (1 + np.exp(-np.roll(signed, 2, 0) - 2.5 * rough / rough.std()))).astype(np.float32)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_manifest_is_true() -> None:
    entry = json.loads(PATH.with_name("manifest.json").read_text())[PATH.name]
    assert entry["sha256"] == sha256(PATH)
    assert entry["bytes"] == PATH.stat().st_size < 10_000_000
    assert entry["parameters"] == read(PATH).parameters < 3_000_000
    assert entry["licence"] == "Apache-2.0"
    assert entry["runs"]
    assert {"command", "script_sha256", "seed", "steps", "minutes"} <= entry["runs"][-1].keys()
    assert entry["held_out_dice"]["box"] > 0.7


def test_it_is_complete_and_half_precision_on_disk() -> None:
    found = read(PATH)
    assert describe(PATH).items() >= {"kind": "aslseg", "image_size": 192, "adapters": False}.items()
    assert not found.missing
    assert not found.unexpected
    assert found.architecture == SMALL
    assert {v.dtype for v in found.state.values()} == {torch.float16}


def test_it_improves_a_mediocre_liver(model: SAMModel, abdomen: tuple[np.ndarray, np.ndarray]) -> None:
    image, (liver, _) = abdomen
    ssl = mediocre(liver)
    redrawn = redraw(model, image, ssl[None], SETTINGS)[0]
    before, after = dice(ssl >= 0.5, liver), dice(redrawn >= 0.5, liver)
    assert after > 0.8
    assert after > before


def test_a_box_in_3d_gives_the_liver(model: SAMModel, abdomen: tuple[np.ndarray, np.ndarray]) -> None:
    image, (liver, _) = abdomen
    ends = np.argwhere(liver)
    roi = np.stack([ends.min(0), ends.max(0)], 1).ravel().tolist()
    found = ClickSession(SlicePredictor(model, image, SETTINGS)).answer(parse({"roi": roi}, image.shape))
    assert dice(found > 0, liver) > 0.75


def test_one_click_on_a_slice_gives_most_of_the_organ(model: SAMModel, abdomen: tuple[np.ndarray, np.ndarray]) -> None:
    image, (liver, _) = abdomen
    k = int(liver.sum((0, 1)).argmax())
    depth = ndimage.distance_transform_edt(liver[..., k])
    i, j = np.unravel_index(depth.argmax(), depth.shape)
    one = np.ascontiguousarray(image[..., k : k + 1])
    prompt = parse({"foreground": [[int(i), int(j), 0]]}, one.shape)
    found = ClickSession(SlicePredictor(model, one, SETTINGS)).answer(prompt)
    assert found[i, j, 0] == 1
    assert dice(found[..., 0] > 0, liver[..., k]) > 0.6


def test_bfloat16_blocks_draw_the_same_masks(abdomen: tuple[np.ndarray, np.ndarray]) -> None:
    """The numbers of bfloat16 can be had on every processor, if slowly."""
    image, truth = abdomen
    model = load(PATH, SETTINGS)
    slices = np.flatnonzero(truth[0].any((0, 1)))[::4]
    guess = truth[:1, ..., slices].astype(np.float32)
    drawn = []
    for model.bf16 in (False, True):
        drawn.append(redraw(model, image[..., slices], guess, SETTINGS) >= 0.5)
    assert dice(*drawn) > 0.999
    blocks: list[torch.dtype] = []
    model.sam.image_encoder.blocks[1].register_forward_pre_hook(lambda _, inputs: blocks.append(inputs[0].dtype))
    redraw(model, image[..., slices[:1]], guess[..., :1], SETTINGS)
    assert set(blocks) == {torch.float32}
