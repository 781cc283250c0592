from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aslseg.errors import BadImageError
from aslseg.sam.modeling.architecture import SMALL, build
from aslseg.sam.modeling.build import SAMModel
from aslseg.serving import open_scans
from aslseg.serving.open_scans import ScanCache, SliceOrientation
from aslseg.settings import Settings


def write(path: Path, value: float, shape: tuple[int, int, int] = (6, 5, 4), spacing: float = 1.0) -> Path:
    array = np.full(shape, value, np.int16)
    array[0, 0, 0] = -1000
    nib.save(nib.Nifti1Image(array, np.diag([1, 1, spacing, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def model() -> SAMModel:
    return SAMModel(build(SMALL), SMALL, fingerprint="x")


def test_a_scan_is_read_once_and_windowed_by_the_slice(tmp_path: Path) -> None:
    opened = ScanCache(Settings())
    path = write(tmp_path / "a.nii.gz", 40)
    first = opened.open(path)
    assert opened.open(path) is first
    assert first.source.shape == (6, 5, 4)
    assert first.source.slice(0)[0, 0] == 0
    np.testing.assert_allclose(first.source.slice(0)[1:], 0.5)  # 40 HU in -160..240
    assert opened.open(path, native=True).source.volume.base is not None
    assert np.shares_memory(opened.open(path, native=True).source.volume, first.source.volume)


def test_a_file_that_changes_under_its_name_is_another_scan(tmp_path: Path, model: SAMModel) -> None:
    opened = ScanCache(Settings())
    path = write(tmp_path / "a.nii.gz", 40)
    stat = path.stat()
    before = opened.open(path)
    write(path, 140)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same time, as rsync and cp -p leave it
    after = opened.open(path)
    np.testing.assert_allclose(after.source.slice(0)[1:], 0.75)
    assert before.key != after.key
    assert before.source.name(1, model) != after.source.name(1, model)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.nii.gz", 40)
    read = open_scans.read_image

    def slow(path: Path, most: float) -> object:
        volume = read(path, most)
        write(path, 90, (6, 5, 3))
        return volume

    monkeypatch.setattr(open_scans, "read_image", slow)
    with pytest.raises(BadImageError, match="changed on disk while it was read"):
        ScanCache(Settings()).open(path)


def test_the_oldest_scans_leave_memory(tmp_path: Path) -> None:
    one = write(tmp_path / "a.nii.gz", 1)
    opened = ScanCache(Settings(), limit=6 * 5 * 4 * 4 * 2)
    first = opened.open(one)
    for name in "bc":
        opened.open(write(tmp_path / f"{name}.nii.gz", 1))
    assert opened.open(one) is not first


@pytest.mark.parametrize("spacing", [0.3, 10.0])
@pytest.mark.parametrize("slices", [1, 3])
def test_thin_thick_and_single_slices(tmp_path: Path, spacing: float, slices: int) -> None:
    found = ScanCache(Settings()).open(write(tmp_path / "a.nii.gz", 40, (6, 5, slices), spacing))
    assert found.source.shape == (6, 5, slices)


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="no such file"):
        ScanCache(Settings()).open(tmp_path / "none.nii.gz")


@pytest.mark.parametrize("flat", [0, 1, 2])
@pytest.mark.parametrize("slices", [1, 5])
def test_a_few_slices_are_sliced_along_their_own_axis_whatever_the_spacing(flat: int, slices: int) -> None:
    shape = [128, 128, 128]
    shape[flat] = slices
    turn = SliceOrientation.of(tuple(shape), np.eye(4), native=False)
    assert turn.view(np.zeros(shape)).shape == (128, 128, slices)
    assert SliceOrientation.of((128, 128, 40), np.eye(4), native=False).sliced == 2
    assert SliceOrientation.of((40, 128, 128), np.eye(4), native=False).sliced == 2, "a volume is sliced axially"
