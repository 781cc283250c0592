"""Tiny cases on the working grid: a bright ellipsoid in noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.settings import load_settings
from aslseg.types import Volume
from aslseg.volume.geometry import Grid


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_case():
    def make(seed: int, labelled: bool = True, shape: tuple[int, int, int] = (36, 34, 16)) -> Prepared:
        rng = np.random.default_rng(seed)
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        centre, radius = rng.uniform(-0.2, 0.2, 3), rng.uniform(0.4, 0.6)
        label = (sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2).astype(np.uint8)
        image = np.clip(0.3 + 0.35 * label + rng.normal(0, 0.08, shape), 0, 1).astype(np.float32)
        grid = Grid.of(Volume(image, np.eye(4)), None)
        return Prepared(f"case{seed}", f"case{seed}", image, grid, label if labelled else None)

    return make


@pytest.fixture
def tiny_settings():
    def make(**changes: object):
        conf = {
            "labels": "blob",
            "patch": "32,32,16",
            "network": "vnet_small",
            "learning_rate": "0.02",
            "threads": "1",
            **{k: str(v) for k, v in changes.items()},
        }
        return load_settings(conf, env={})[0]

    return make
