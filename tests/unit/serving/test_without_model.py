"""A request without a model, as 3D Slicer sends it by itself: the stored mask of the scan, or an empty one."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

from aslseg.errors import BadImageError
from aslseg.serving.inference_request import InferenceRequest
from aslseg.serving.params import validate_params
from aslseg.serving.replies import without_model
from aslseg.settings import Paths, Settings

AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])
SHAPE = (6, 5, 4)
NAMES = {"liver": 1, "tumour": 2}


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    (folder / "labels" / "original").mkdir(parents=True)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), AFFINE), folder / "a.nii.gz")
    return folder


def store(studies: Path, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[1:3, 1:3, 1:3], mask[2, 2, 2] = 1, 2
    nib.save(nib.Nifti1Image(mask, AFFINE), studies / "labels" / "original" / "a.nii.gz")
    return mask


def ask(studies: Path, case: str | None = "a") -> tuple[np.ndarray, dict]:
    settings = Settings(model_dir=str(studies / "models"))
    request = InferenceRequest("", studies / "a.nii.gz", validate_params({}), case)
    found = without_model(request, settings, Paths(settings, studies))
    image = sitk.ReadImage(found["file"])
    assert np.allclose(image.GetSpacing(), (0.8, 0.8, 2.5))
    Path(found["file"]).unlink()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), found["params"]


def test_the_stored_mask(studies: Path) -> None:
    mask = store(studies)
    found, told = ask(studies)
    assert np.array_equal(found, mask)
    assert (told["source"], told["label_names"]) == ("stored", NAMES)


def test_an_empty_mask_where_nothing_fits_the_scan(studies: Path) -> None:
    found, told = ask(studies)
    assert (found.shape, found.any(), told["source"], told["label_names"]) == (SHAPE, False, "nothing stored", NAMES)
    store(studies, (6, 5, 5))
    assert not ask(studies)[0].any(), "made for another shape"
    store(studies)
    later = (studies / "labels" / "original" / "a.nii.gz").stat().st_mtime + 5
    os.utime(studies / "a.nii.gz", (later, later))
    assert not ask(studies)[0].any(), "made for a scan that was replaced since"
    assert not ask(studies, case=None)[0].any(), "an upload"


def test_a_scan_that_cannot_be_read_is_named(studies: Path) -> None:
    (studies / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"a\.nii\.gz"):
        ask(studies)
