"""Small scans on the working grid: bright ellipsoids in noise, made here so that these tests need no phantom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from aslseg.adaptation.geometry_mm import random_field
from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings
from aslseg.volume.geometry import Grid

SPACING = (2.0, 2.0, 4.0)


def ellipsoid(shape: tuple[int, int, int], centre: tuple[float, ...], axes: tuple[float, ...]) -> np.ndarray:
    """Bool mask; centre and semi-axes in voxels."""
    grid = np.indices(shape).reshape(3, -1).T
    form = (((grid - np.array(centre)) / np.array(axes)) ** 2).sum(1)
    return (form <= 1).reshape(shape)


@pytest.fixture
def blob() -> np.ndarray:
    """One smooth object, about 20 mm in radius, in 40 x 40 x 20 voxels of 2 x 2 x 4 mm."""
    return ellipsoid((40, 40, 20), (20, 19, 10), (10, 9, 5))


@pytest.fixture
def picture(blob: np.ndarray) -> np.ndarray:
    """The image of ``blob``: it is brighter than its surroundings, and so is another object beside it."""
    rng = np.random.default_rng(3)
    other = ellipsoid(blob.shape, (34, 34, 10), (4, 4, 3))
    return (0.3 + 0.3 * (blob | other) + 0.03 * rng.standard_normal(blob.shape)).astype(np.float32)


@pytest.fixture
def scan() -> Callable[[int], Prepared]:
    """Maker of scans: a liver (1) with one or two darker tumours (2), 40 x 36 x 20 voxels."""

    def make(seed: int) -> Prepared:
        rng = np.random.default_rng(seed)
        shape = (40, 36, 20)
        liver = ellipsoid(shape, (20, 18, 10), tuple(np.array([14, 12, 7]) * rng.uniform(0.85, 1.15, 3)))
        tumour = np.zeros(shape, bool)
        for _ in range(int(rng.integers(1, 3))):
            centre = np.array([20, 18, 10]) + rng.uniform(-1, 1, 3) * [6, 5, 3]
            tumour |= ellipsoid(shape, tuple(centre), tuple(rng.uniform(2.5, 4.5) * np.array([1, 1, 0.6])))
        label = (liver.astype(np.uint8) + (tumour & liver)).astype(np.uint8)
        image = 0.3 + 0.3 * liver - 0.2 * (tumour & liver) + 0.04 * random_field(shape, SPACING, 2, rng)
        grid = Grid(shape, np.diag([*SPACING, 1.0]), shape, shape, SPACING)
        return Prepared(f"scan{seed}", f"p{seed}", image.astype(np.float32), grid, label)

    return make


@pytest.fixture
def settings() -> Settings:
    """Liver with tumours, tiny patches, one thread."""
    return Settings(patch="32,32,16", adapter_iterations=2, threads=1, device="cpu", overlap=0.25)
