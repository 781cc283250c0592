import logging
import os

import numpy as np
import pytest

from aslseg.cases import prepare as module
from aslseg.cases.prepare import PreparedStore, automatic_patch, prepare, working_spacing
from aslseg.cases.studies import Case
from aslseg.compute.hardware import resolved
from aslseg.errors import BadLabelError
from aslseg.settings import Settings
from aslseg.types import Volume
from aslseg.volume import io
from aslseg.volume.io import write_image, write_label
from aslseg.volume.phantom import make_phantom

SETTINGS = Settings()
SHAPE = (24, 24, 8)


def volume(shape, spacing):
    return Volume(np.broadcast_to(np.float32(0), shape), np.diag([*spacing, 1.0]))


@pytest.fixture
def case(tmp_path):
    scan, truth = make_phantom(0, 2, shape=SHAPE)
    write_image(tmp_path / "x.nii.gz", scan)
    write_label(tmp_path / "labels" / "x.nii.gz", truth, scan.affine)
    return Case("x", tmp_path / "x.nii.gz", "P", "train", tmp_path / "labels" / "x.nii.gz")


def test_spacing_is_the_median_of_the_scans():
    scans = [volume((50, 50, 10), (s, s, 5.0)) for s in (1.0, 2.0, 4.0)]
    assert working_spacing(scans, SETTINGS) == (2.0, 2.0, 5.0)


def test_spacing_is_taken_along_ras_axes():
    turned = Volume(
        np.zeros((10, 20, 30), np.float32), np.array([[0, 0, 2.0, 0], [3, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 1]])
    )
    assert working_spacing([turned], SETTINGS) == (2.0, 3.0, 4.0)


def test_large_scans_are_coarsened_on_their_finest_axes():
    settings = Settings(max_working_voxels=1e6)
    found = working_spacing([volume((512, 512, 100), (0.7, 0.7, 5.0))], settings)
    assert found[0] == found[1] > 0.7
    assert found[2] == 5.0
    voxels = np.prod(np.multiply((512, 512, 100), (0.7, 0.7, 5.0)) / found)
    assert 0.9e6 < voxels <= 1e6
    thick = working_spacing([volume((512, 512, 600), (0.7, 0.7, 0.7))], settings)
    assert max(thick) == pytest.approx(min(thick), rel=0.03)


def test_spacing_by_setting():
    assert working_spacing([], Settings(spacing="native")) is None
    assert working_spacing([], Settings(spacing="1.5,1.5,3")) == (1.5, 1.5, 3.0)


def test_prepare_gives_intensities_in_0_to_1_on_the_grid():
    scan, _ = make_phantom(0, 2, shape=SHAPE)
    image, grid = prepare(scan, SETTINGS, (16.0, 16.0, 40.0))
    assert image.shape == grid.shape
    assert image.shape[0] == 12
    assert image.dtype == np.float32
    assert image.min() == 0
    assert image.max() <= 1
    # a phantom stored in LPS order comes out with the liver (bright) at high x
    middle = image[:, 4:8, image.shape[2] // 2]
    assert middle[7:10].mean() > middle[2:5].mean()


def test_store_keeps_what_it_computed(tmp_path, case, monkeypatch):
    store = PreparedStore(tmp_path / "cache", SETTINGS, None)
    first = store.load(case)
    assert first.image.shape == first.label.shape == SHAPE
    assert (first.id, first.patient, first.weight) == ("x", "P", 1.0)
    assert not first.image.flags.writeable
    monkeypatch.setattr("aslseg.cases.prepare.read_image", None)
    again = store.load(case)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    assert again.grid.shape == first.grid.shape
    assert np.array_equal(again.grid.affine, first.grid.affine)


def test_store_sees_a_new_label_and_new_settings(tmp_path, case):
    store = PreparedStore(tmp_path / "cache", SETTINGS, None)
    store.load(case)
    corrected = np.zeros(SHAPE, np.uint8)
    write_label(case.label, corrected, io.read_image(case.image).affine)
    assert store.load(case).label.max() == 0
    wide = PreparedStore(tmp_path / "cache", Settings(window_high=2000), None)
    assert wide.load(case).image.mean() < store.load(case).image.mean()
    coarse = PreparedStore(tmp_path / "cache", SETTINGS, (16.0, 16.0, 20.0))
    assert coarse.load(case).image.shape == (12, 12, 8)


def test_what_is_not_used_for_a_week_is_deleted(tmp_path, case):
    """Each label that is saved again, and each other grid, would leave a copy of the image for ever."""
    cache = tmp_path / "cache"
    before = PreparedStore(cache, SETTINGS, None).load(case)
    write_label(case.label, np.zeros(SHAPE, np.uint8), io.read_image(case.image).affine)
    for path in cache.iterdir():
        os.utime(path, (0, 0))
    PreparedStore(cache, SETTINGS, (16.0, 16.0, 20.0)).load(case)
    later = PreparedStore(cache, SETTINGS, None)
    later.load(case)
    assert len(list(cache.iterdir())) == 6
    later.prune()
    assert len(list(cache.iterdir())) == 4, "the other grid's are young"
    assert PreparedStore(cache, SETTINGS, None).load(case).label.max() == 0
    assert before.image.mean() > 0, "what somebody has open stays readable"


def test_unlabelled_cases_have_no_label(tmp_path, case):
    found = PreparedStore(tmp_path / "cache", SETTINGS, None).load(Case("x", case.image, "P", "unlabelled"))
    assert found.label is None
    assert found.image.shape == SHAPE


def test_prepared_goes_back_to_the_scans_own_grid(tmp_path, case):
    found = PreparedStore(tmp_path / "cache", SETTINGS, None).load(case)
    stored = io.read_label(case.label, io.read_image(case.image), SETTINGS.label_set)
    assert np.array_equal(
        found.grid.regions_to_native(SETTINGS.label_set.regions(np.asarray(found.label)), SETTINGS.label_set), stored
    )


def test_bad_cases_are_skipped_with_the_reason(tmp_path, case, caplog):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"x")
    elsewhere = tmp_path / "labels" / "elsewhere.nii.gz"
    write_label(elsewhere, np.zeros((3, 3, 3)), np.eye(4))
    cases = [
        case,
        Case("broken", broken, "broken", "unlabelled"),
        Case("elsewhere", case.image, "elsewhere", "train", elsewhere),
    ]
    store = PreparedStore(tmp_path / "cache", SETTINGS, None)
    with caplog.at_level(logging.WARNING):
        prepared, skipped = store.load_all(cases)
    assert [p.id for p in prepared] == ["x"]
    assert "broken.nii.gz" in skipped["broken"]
    assert "shape (3, 3, 3)" in skipped["elsewhere"]
    assert "skipped case broken" in caplog.text
    with pytest.raises(BadLabelError):
        store.load(cases[2])


def test_patch_fits_the_scans_and_the_memory():
    patch = automatic_patch([(96, 96, 32)], SETTINGS)
    assert all(p % 16 == 0 for p in patch)
    assert np.prod(patch) <= resolved(SETTINGS).patch_voxels
    assert patch[2] == 32, "the longest axes shrink first"
    assert automatic_patch([(40, 40, 20)], SETTINGS) == (48, 48, 32)


def test_patch_is_never_too_small_for_batch_norm():
    assert automatic_patch([(10, 10, 3)], SETTINGS) == (32, 32, 16)
    assert automatic_patch([(500, 500, 500)], Settings(patch_voxels=600)) == (32, 32, 16)


def test_patch_by_setting_is_rounded_to_16():
    assert automatic_patch([], Settings(patch="100,90,20")) == (96, 96, 16)


def test_a_scan_of_a_wrong_voxel_size_is_skipped_with_the_reason(tmp_path, case):
    scan, _ = make_phantom(0, 3, shape=SHAPE)
    affine = np.diag([40.0, 40.0, 40.0, 1.0])
    write_image(tmp_path / "big.nii.gz", Volume(scan.array, affine))
    big = Case("big", tmp_path / "big.nii.gz", "Q", "unlabelled")
    store = PreparedStore(tmp_path / "cache", Settings(max_working_voxels=2000), (1.0, 1.0, 1.0))
    prepared, skipped = PreparedStore(tmp_path / "cache", SETTINGS, None).load_all([case])
    assert (len(prepared), skipped) == (1, {})
    prepared, skipped = store.load_all([big])
    assert not prepared
    assert "24 x 24 x 8 voxels of 40.0 x 40.0 x 40.0 mm" in skipped["big"]
    assert "correct its voxel size" in skipped["big"]


def test_a_label_prepared_by_a_version_that_lost_small_lesions_is_prepared_again(tmp_path, case, monkeypatch):
    coarse = (20.0, 20.0, 20.0)
    for labels, spacing, files in (("liver,tumour", coarse, 3), ("liver,tumour", None, 2), ("liver,spleen", coarse, 2)):
        cache = tmp_path / f"{labels}{spacing is None}"
        store = PreparedStore(cache, Settings(labels=labels), spacing)
        monkeypatch.setattr(module, "LESIONS_KEPT", 0)
        store.load(case)
        monkeypatch.undo()
        store.load(case)
        assert len(list(cache.glob("*.npy"))) == files


@pytest.mark.parametrize("part", ["image", "label"])
@pytest.mark.parametrize("left", [0.5, 0.0])
def test_a_damaged_prepared_case_is_computed_again(tmp_path, case, part, left, caplog):
    store = PreparedStore(tmp_path / "cache", SETTINGS, None)
    first = {"image": np.array(store.load(case).image), "label": np.array(store.load(case).label)}
    (file,) = (tmp_path / "cache").glob(f"x-*.{part}.npy")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])
    with caplog.at_level(logging.WARNING):
        again = store.load(case)
    assert np.array_equal(getattr(again, part), first[part])
    assert "is damaged" in caplog.text
    assert file.read_bytes() == content
