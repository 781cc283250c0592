"""A SAM small enough to train in a test, and slices it can tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.weights import save_weights
from aslseg.sam.modeling.architecture import build
from aslseg.sam.modeling.build import SAMModel
from aslseg.settings import Settings
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from seeing_sam import TINY


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> SAMModel:
    torch.manual_seed(0)
    model = SAMModel(build(TINY), TINY)
    model.bf16 = False
    return model


@pytest.fixture
def tiny_file(tiny: SAMModel, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_weights(path, tiny.sam.state_dict(), tiny.metadata)
    return path


@pytest.fixture
def settings() -> Settings:
    """Nothing is enlarged: on slices of 40 x 32 pixels everything is small. test_sam_zoom.py has its own."""
    return Settings(sam_iterations=12, sam_batch=2, sam_learning_rate=1e-3, sam_zoom=0, device="cpu")


@pytest.fixture
def ball_case() -> Callable[..., Prepared]:
    return _ball_case


def _ball_case(name: str = "a", *, shape: tuple[int, int, int] = (40, 32, 5), tumour: bool = True) -> Prepared:
    """A bright ball (label 1) with a darker one (label 2) in it, on a noisy ground."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    ball = (i - 16) ** 2 + (j - 14) ** 2 + 9 * (k - shape[2] // 2) ** 2 < 100
    inner = (i - 18) ** 2 + (j - 15) ** 2 + 9 * (k - shape[2] // 2) ** 2 < 16
    label = ball.astype(np.uint8)
    if tumour:
        label[inner] = 2
    noise = np.random.default_rng(0).normal(0, 0.02, shape)
    image = (0.2 + 0.5 * ball - 0.25 * (label == 2) + noise).clip(0, 1).astype(np.float32)
    grid = Grid.of(Volume(image, np.eye(4)), None)
    return Prepared(name, name, image, grid, label)
