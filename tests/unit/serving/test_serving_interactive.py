"""A click on a voxel of the scan is a click on the same place of the working grid, whatever the scan's axes."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from aslseg.prompts.from_client import parse
from aslseg.serving.interactive import to_working
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

CODES = ["".join(c) for p in permutations(("RL", "AP", "SI")) for c in product(*p)]
TILT = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("spacing", [None, (1.0, 1.3, 2.0)])
def test_all_orientations(codes: str, spacing: tuple[float, float, float] | None) -> None:
    shape = (10, 12, 14)
    ornt = nib.orientations.axcodes2ornt(codes)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (to, direction) in enumerate(ornt):
        affine[int(to), axis] = direction * (0.9, 1.1, 1.7)[axis]
    affine[:3, :3] = TILT @ affine[:3, :3]
    array = np.zeros(shape, np.float32)
    array[2:5, 6:9, 9:13] = 1
    grid = Grid.of(Volume(array, affine), spacing)
    prompt = parse({"foreground": [[3, 7, 11]], "background": [[8, 1, 2]], "roi": [4, 2, 6, 8, 12, 9]}, shape)
    moved = to_working(prompt, grid)
    working = grid.to_working(array)
    assert working[tuple(moved.foreground[0])] > 0.5
    assert working[tuple(moved.background[0])] < 0.5
    assert moved.slice == moved.foreground[0, 2]
    inside = working > 0.5
    low, high = np.argwhere(inside).min(0), np.argwhere(inside).max(0)
    assert np.abs(np.array(moved.box) - np.stack([low, high], 1)).max() <= 1
