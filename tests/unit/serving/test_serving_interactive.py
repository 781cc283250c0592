"""A click on a voxel of the scan is a click on the same place of the picture, whatever the scan's axes."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from aslseg.prompts.from_client import parse
from aslseg.serving.open_scans import SliceOrientation
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

CODES = ["".join(c) for p in permutations(("RL", "AP", "SI")) for c in product(*p)]
TILT = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])


def affine_of(codes: str, spacing: tuple[float, float, float] = (0.9, 1.1, 1.7)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (to, direction) in enumerate(nib.orientations.axcodes2ornt(codes)):
        affine[int(to), axis] = direction * spacing[axis]
    affine[:3, :3] = TILT @ affine[:3, :3]
    return affine


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("native", [False, True])
def test_all_orientations(codes: str, native: bool) -> None:
    shape, affine = (10, 12, 14), affine_of(codes)
    array = np.zeros(shape, np.float32)
    array[2:5, 6:9, 9:13] = 1
    turn = SliceOrientation.of(shape, affine, native)
    asked = parse({"foreground": [[3, 7, 11]], "background": [[8, 1, 2]], "roi": [4, 2, 6, 8, 12, 9]}, shape)
    moved, view = turn.prompt(asked), turn.view(array)
    assert view[tuple(moved.foreground[0])] == 1
    assert view[tuple(moved.background[0])] == 0
    low, high = np.argwhere(view == 1).min(0), np.argwhere(view == 1).max(0)
    assert np.array(moved.box).T.tolist() == [low.tolist(), high.tolist()]
    assert moved.slice == (moved.foreground[0, 2] if turn.axes[2] == 2 else None)
    view[tuple(moved.background[0])] = 7
    assert array[8, 1, 2] == 7, "writing into the view writes into the scan's array"
    if native:
        assert turn.axes[2] == 2
    else:
        assert turn.sliced == 2
        canonical = Grid.of(Volume(array, affine), None).to_working(array)
        assert np.array_equal(view, canonical)
        assert np.array_equal(turn.of_working(canonical), view)


def test_a_scan_of_sagittal_slices_is_sliced_as_it_was_made() -> None:
    sagittal = affine_of("PSR", (0.9, 0.9, 5.0))
    turn = SliceOrientation.of((64, 64, 20), sagittal, native=False)
    assert (turn.axes[2], turn.sliced) == (2, 0)
    assert SliceOrientation.of((64, 64, 20), affine_of("PSR", (0.9, 0.9, 1.0)), native=False).sliced == 2
