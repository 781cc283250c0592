import tracemalloc
import warnings
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch

from aslseg.compute.overlap import dice
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid, resize, resize_label

LABELS = Labels.parse("liver,tumour", "tumour:liver")
SPACING = (0.8, 1.5, 4.0)
ORIENTATIONS = [
    np.array(list(zip(axes, flips, strict=True)))
    for axes in permutations(range(3))
    for flips in product((1.0, -1.0), repeat=3)
]
OBLIQUE = nib.eulerangles.euler2mat(0.2, -0.15, 0.1)


def stored(array, orientation, turn=None):
    """A RAS array as a file with another axis order would hold it, with the affine that says so."""
    affine = nib.affines.from_matvec((np.eye(3) if turn is None else turn) @ np.diag(SPACING), (-30, 20, 500))
    native = nib.orientations.apply_orientation(
        array, nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), orientation)
    )
    back = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), orientation), array.shape
    )
    return Volume(native, affine @ back)


def ball(shape, radius, centre=None):
    centre = (np.array(shape) - 1) / 2 if centre is None else np.array(centre)
    offset = np.indices(shape) - centre[:, None, None, None]
    return np.square(offset).sum(0) <= radius**2


@pytest.mark.parametrize("turn", [None, OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: "".join(nib.orientations.ornt2axcodes(o)))
def test_all_48_orientations_there_and_back_exactly(orientation, turn):
    ras = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    volume = stored(ras, orientation, turn)
    grid = Grid.of(volume, None)
    assert grid.spacing == pytest.approx(SPACING)
    assert grid.shape == (5, 6, 7)
    assert np.array_equal(grid.to_working(volume.array), ras)
    assert np.array_equal(grid.to_native(ras), volume.array)
    label = (ras * 3).astype(np.uint8)
    native_label = stored(label, orientation, turn).array
    assert np.array_equal(grid.label_to_working(native_label, LABELS), label)
    assert np.array_equal(grid.regions_to_native(LABELS.regions(label), LABELS), native_label)


def test_many_regions_of_a_large_scan_are_brought_back_one_by_one():
    labels = Labels.parse(",".join(f"l{n}" for n in range(12)))
    volume = stored(np.zeros((64, 64, 40), np.float32), ORIENTATIONS[-1])
    grid = Grid.of(volume, (3.2, 6.0, 8.0))
    regions = np.random.default_rng(0).random((12, *grid.shape), np.float32)
    tracemalloc.start()
    found = grid.regions_to_native(regions, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * volume.array.nbytes
    expected = np.zeros(found.shape, np.uint8)
    for n, region in enumerate(regions):
        expected[grid.to_native(region) >= 0.5] = n + 1
    assert np.array_equal(found, expected)


def test_working_spacing_runs_along_ras_axes():
    volume = stored(np.zeros((20, 30, 10), np.float32), ORIENTATIONS[-1])
    grid = Grid.of(volume, (1.6, 3.0, 2.0))
    assert volume.array.shape == (10, 30, 20)
    assert grid.shape == (10, 15, 20)
    assert grid.spacing == pytest.approx((1.6, 3.0, 2.0))


def test_spacing_is_exact_where_it_does_not_divide():
    volume = Volume(np.zeros((10, 10, 10), np.float32), np.eye(4))
    grid = Grid.of(volume, (3.0, 3.0, 30.0))
    assert grid.shape == (3, 3, 1)
    assert np.multiply(grid.shape, grid.spacing) == pytest.approx((10, 10, 10))


def test_halving_is_the_block_mean():
    array = np.random.default_rng(1).random((8, 6, 4)).astype(np.float32)
    grid = Grid.of(Volume(array, np.eye(4)), (2.0, 2.0, 2.0))
    expected = array.reshape(4, 2, 3, 2, 2, 2).mean((1, 3, 5))
    assert np.allclose(grid.to_working(array), expected, atol=1e-6)


@pytest.mark.parametrize("spacing", [(1.7, 1.7, 1.7), (2.5, 1.0, 1.3), (0.6, 0.6, 0.6), (3.0, 0.5, 1.0)])
def test_places_are_kept_by_resampling(spacing):
    shape, centre = (40, 36, 30), (17.0, 20.0, 12.0)
    array = ball(shape, 8, centre).astype(np.float32)
    grid = Grid.of(Volume(array, np.eye(4)), spacing)
    working = grid.to_working(array)
    # voxel centres lie at (index + 1/2) x spacing from the corner of the volume
    indices = np.indices(working.shape).reshape(3, -1)
    found = (indices + 0.5) @ (working.ravel() / working.sum()) * grid.spacing
    assert found == pytest.approx(np.array(centre) + 0.5, abs=0.1)
    assert dice(grid.to_native(working) >= 0.5, array > 0) > 0.93


def test_thin_slices_are_not_skipped():
    kept = []
    for k in range(1, 33):
        array = np.zeros((2, 2, 34), np.float32)
        array[:, :, k] = 1
        working = Grid.of(Volume(array, np.eye(4)), (1.0, 1.0, 1.7)).to_working(array)
        assert working.shape[2] == 20
        kept.append(working.sum() * 1.7 / array.sum())
    assert min(kept) > 0.6
    assert np.mean(kept) == pytest.approx(1, abs=0.02)


def test_labels_stay_nested_and_smooth():
    label = ball((40, 40, 20), 9).astype(np.uint8)
    label[ball((40, 40, 20), 4)] = 2
    grid = Grid.of(Volume(label, np.diag([1.0, 1.0, 2.0, 1.0])), (1.5, 1.5, 1.5))
    working = grid.label_to_working(label, LABELS)
    assert working.dtype == np.uint8
    assert set(np.unique(working)) == {0, 1, 2}
    native = grid.regions_to_native(LABELS.regions(working), LABELS)
    assert native.shape == label.shape
    for region in range(2):
        assert dice(LABELS.regions(native)[region], LABELS.regions(label)[region]) > 0.92
    # no liver-less tumour border: every tumour voxel's neighbours are liver or tumour
    from scipy.ndimage import binary_dilation

    assert not (binary_dilation(native == 2) & (native == 0)).any()


def test_tumour_at_the_liver_border_stays_tumour():
    label = np.zeros((12, 12, 12), np.uint8)
    label[2:10, 2:10, 2:10] = 1
    label[2:6, 2:6, 2:6] = 2
    working = Grid.of(Volume(label, np.eye(4)), (2.0, 2.0, 2.0)).label_to_working(label, LABELS)
    assert (working == 2).sum() == 8
    assert (working > 0).sum() == 64


def test_probabilities_come_back_as_a_class_map():
    grid = Grid.of(Volume(np.zeros((8, 8, 8), np.float32), np.eye(4)), (2.0, 2.0, 2.0))
    regions = np.zeros((2, 4, 4, 4), np.float32)
    regions[0], regions[1, :2] = 0.9, 0.8
    native = grid.regions_to_native(regions, LABELS)
    assert native.shape == (8, 8, 8)
    assert (native[:3] == 2).all()
    assert (native[5:] == 1).all()


def test_a_single_slice_works():
    array = np.random.default_rng(0).random((16, 16, 1)).astype(np.float32)
    grid = Grid.of(Volume(array, np.diag([1.0, 1.0, 5.0, 1.0])), (2.0, 2.0, 2.5))
    assert grid.shape == (8, 8, 2)
    assert grid.to_native(grid.to_working(array)).shape == (16, 16, 1)


def test_what_is_mapped_read_only_is_resized_without_a_warning_of_torch():
    array = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    array.flags.writeable = False
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resize(array, (4, 4, 4)).shape == (4, 4, 4)
    finally:
        torch.set_warn_always(before)


@pytest.mark.parametrize("shape", [(19, 20, 10), (9, 11, 7), (30, 31, 20)])
def test_a_lesion_of_one_voxel_keeps_a_voxel_where_it_lies(shape):
    label = ball((20, 21, 12), 5).astype(np.uint8)
    middles = [(9, 10, 5), (11, 13, 6), (7, 9, 7)]
    for at in middles:
        label[at] = 2
    # an organ's specks are none of a lesion's: they go as before
    label[1, 1, 1] = 1
    small = resize_label(label, LABELS, shape)
    found = np.argwhere(small == 2)
    places = [tuple(((np.array(at) + 0.5) * shape / label.shape).astype(int)) for at in middles]
    assert all(min(np.abs(found - place).max(1)) <= 1 for place in places)
    if np.prod(shape) < label.size:
        assert sorted(map(tuple, found)) == sorted(places)
    if shape == (9, 11, 7):
        assert small[0, 0, 0] == 0
    assert dice(small > 0, resize((label > 0).astype(np.float32), shape) >= 0.5) > 0.99


def test_a_lesion_that_the_grid_shows_is_drawn_as_before():
    label = ball((24, 24, 24), 9).astype(np.uint8)
    label[ball((24, 24, 24), 4)] = 2
    smooth = LABELS.decode(resize(np.isin(label, m).astype(np.float32), (15, 15, 15)) for m in ([1, 2], [2]))
    np.testing.assert_array_equal(resize_label(label, LABELS, (15, 15, 15)), smooth)
