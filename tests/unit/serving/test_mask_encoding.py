"""Replies as other people's readers read them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

from aslseg.serving.mask_encoding import BLOCK, gzipped, gzipped_bytes, nrrd


def blocks(rng: np.random.Generator, lengths: list[int]) -> list[bytes]:
    """Random, repeated and empty blocks in turn."""
    kinds = (lambda n: rng.integers(0, 256, n, np.uint8).tobytes(), bytes, lambda n: b"\x01" * n, bytes)
    return [kinds[n % 4](length) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 5, 5, 5], [1000, 70_000, 3, 70_000, 0, 70_000], [BLOCK] * 6])
def test_one_ordinary_gzip_stream(lengths: list[int]) -> None:
    made = blocks(np.random.default_rng(0), lengths)
    packed = gzipped(made)
    assert gzip.decompress(packed) == b"".join(made)


def test_empty_slices_cost_next_to_nothing() -> None:
    content = bytes(20 * BLOCK) + b"\x01" * 100 + bytes(3 * BLOCK + 17)
    packed = gzipped_bytes(content)
    assert gzip.decompress(packed) == content
    assert len(packed) < 24 * 400


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
def test_nrrd_is_read_by_itk(compress: bool, order: str, tmp_path: Path) -> None:
    mask = np.zeros((7, 6, 5), np.uint8, order=order)  # type: ignore[call-overload]
    mask[1:4, 2:5, 3] = 1
    mask[6, 5, 4] = 2
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, -1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.3, 0.8, 10.0])
    affine[:3, 3] = 12.5, -40.25, 1000
    path = tmp_path / "mask.nrrd"
    path.write_bytes(nrrd(mask, affine, compress))
    read = sitk.ReadImage(str(path))
    assert np.array_equal(sitk.GetArrayFromImage(read).transpose(2, 1, 0), mask)
    assert read.GetPixelID() == sitk.sitkUInt8
    corner = (3, 2, 1)
    np.testing.assert_allclose(
        np.array(read.TransformIndexToPhysicalPoint(corner)) * [-1, -1, 1], (affine @ [*corner, 1])[:3], atol=1e-9
    )
