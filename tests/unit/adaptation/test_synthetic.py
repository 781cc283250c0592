"""Each synthetic error does what its name says, and together they are as bad as networks are."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from aslseg.adaptation import synthetic
from aslseg.adaptation.geometry_mm import box_of, components, random_field, signed_distance
from aslseg.adaptation.synthetic import (
    OPERATORS,
    Error,
    corrupt,
    corrupt_region,
    draw_severity,
    soft_pair,
    soften,
)
from aslseg.compute.overlap import dice
from aslseg.types import Labels

SPACING = (2.0, 2.0, 4.0)
PAIR = Labels.parse("liver,tumour", "tumour:liver")


def name(error: Error) -> str:
    return error.apply.__name__


@pytest.mark.parametrize("error", OPERATORS, ids=name)
def test_operator_is_a_pure_function_of_its_generator(error: Error, blob: np.ndarray, picture: np.ndarray) -> None:
    before, seen = blob.copy(), picture.copy()
    apply = error.apply
    first = apply(blob, picture, SPACING, np.random.default_rng(4), 0.8)
    again = apply(blob, picture, SPACING, np.random.default_rng(4), 0.8)
    assert first.dtype == bool
    assert first.shape == blob.shape
    assert np.array_equal(first, again)
    assert not np.shares_memory(first, blob)
    assert np.array_equal(blob, before)
    assert np.array_equal(picture, seen)


@pytest.mark.parametrize("error", OPERATORS, ids=name)
def test_severity_zero_changes_nothing(error: Error, blob: np.ndarray, picture: np.ndarray) -> None:
    for seed in range(5):
        out = error.apply(blob, picture, SPACING, np.random.default_rng(seed), 0.0)
        assert np.array_equal(out, blob)


@pytest.mark.parametrize("error", OPERATORS, ids=name)
@pytest.mark.parametrize("image", [True, False])
def test_empty_full_and_single_voxel_masks_are_survived(error: Error, image: bool) -> None:
    shape = (12, 10, 6)
    point = np.zeros(shape, bool)
    point[0, 9, 5] = True
    picture = np.random.default_rng(0).random(shape, np.float32) if image else None
    for mask in (np.zeros(shape, bool), np.ones(shape, bool), point):
        for seed in range(4):
            out = error.apply(mask, picture, SPACING, np.random.default_rng(seed), 1.0)
            assert out.shape == shape
            assert out.dtype == bool


def test_signed_distance_is_in_millimetres_on_anisotropic_voxels() -> None:
    mask = np.zeros((21, 21, 21), bool)
    mask[10, 10, 10] = True
    phi = signed_distance(mask, (1.0, 2.0, 5.0))
    assert phi[10, 10, 10] < 0
    assert phi[14, 10, 10] == pytest.approx(4 - 0.5)
    assert phi[10, 14, 10] == pytest.approx(8 - 0.5)
    assert phi[10, 10, 12] == pytest.approx(10 - 0.5)
    assert np.array_equal(phi < 0, mask)
    # the other way round, against scipy
    block = np.zeros((15, 15, 15), bool)
    block[3:12, 4:11, 5:12] = True
    inside = ndimage.distance_transform_edt(block, sampling=(1.0, 2.0, 5.0))
    outside = ndimage.distance_transform_edt(~block, sampling=(1.0, 2.0, 5.0))
    wanted = np.where(block, 0.5 - inside, outside - 0.5)
    np.testing.assert_allclose(signed_distance(block, (1.0, 2.0, 5.0)), wanted, rtol=1e-5)


def test_signed_distance_without_a_border() -> None:
    assert (signed_distance(np.zeros((3, 4, 5), bool), SPACING) == 1e4).all()
    assert (signed_distance(np.ones((3, 4, 5), bool), SPACING) == -1e4).all()


def test_random_field_has_unit_variance_and_its_length_in_millimetres() -> None:
    field = random_field((48, 48, 24), (1.0, 1.0, 4.0), 6.0, np.random.default_rng(0))
    assert field.std() == pytest.approx(1, abs=1e-3)
    along_i = np.corrcoef(field[:-4].ravel(), field[4:].ravel())[0, 1]
    along_k = np.corrcoef(field[..., :-1].ravel(), field[..., 1:].ravel())[0, 1]
    assert along_i == pytest.approx(along_k, abs=0.06)  # 4 voxels of 1 mm are one of 4 mm


def test_miss_takes_small_components_more_often() -> None:
    mask = np.zeros((60, 40, 20), bool)
    mask[2:5, 2:5, 2:4] = True  # 3 mm
    mask[15:55, 8:38, 3:17] = True  # 40 mm
    lost = np.zeros(2)
    for seed in range(60):
        out = synthetic.miss(mask, None, SPACING, np.random.default_rng(seed), 1.0)
        lost += [not out[3, 3, 3], not out[30, 20, 10]]
        assert out.sum() in (0, 18, mask.sum() - 18, mask.sum())  # whole components only
    assert lost[0] > 40
    assert lost[1] < 12


def test_false_lesions_add_objects_away_from_the_true_one(blob: np.ndarray) -> None:
    added = 0
    for seed in range(10):
        out = synthetic.add_false_lesion(blob, None, SPACING, np.random.default_rng(seed), 0.7)
        assert (out >= blob).all()
        added += int(components(out, SPACING)[1].size > 1 or out.sum() > blob.sum())
    assert added == 10


def test_add_similar_object_follows_the_brightness_of_the_object(blob: np.ndarray, picture: np.ndarray) -> None:
    extra = np.zeros_like(blob)
    for seed in range(10):
        out = synthetic.add_similar_object(blob, picture, SPACING, np.random.default_rng(seed), 1.0)
        assert (out >= blob).all()
        extra |= out & ~blob
    assert extra.any()
    assert picture[extra].mean() > 0.45  # the surroundings have 0.3
    assert np.array_equal(synthetic.add_similar_object(blob, None, SPACING, np.random.default_rng(0), 1.0), blob)


def test_offset_border_grows_or_shrinks_and_nothing_else(blob: np.ndarray) -> None:
    kinds = set()
    for seed in range(20):
        out = synthetic.offset_border(blob, None, SPACING, np.random.default_rng(seed), 1.0)
        assert (out >= blob).all() or (out <= blob).all()
        kinds.add(int(np.sign(int(out.sum()) - int(blob.sum()))))
        assert signed_distance(blob, SPACING)[out].max() <= 6.0 + 1e-3
    assert {1, -1} <= kinds


def test_offset_border_reaches_equally_far_in_millimetres_along_all_axes() -> None:
    mask = np.zeros((60, 60, 30), bool)
    mask[20:40, 20:40, 10:20] = True  # 40 mm each way
    grown = next(
        out
        for seed in range(50)
        if (out := synthetic.offset_border(mask, None, SPACING, np.random.default_rng(seed), 1.0)).sum()
        > 1.5 * mask.sum()
    )
    box = box_of(grown, 0, SPACING)
    reach = [(20 - box[0].start) * 2.0, (20 - box[1].start) * 2.0, (10 - box[2].start) * 4.0]
    assert reach[0] == reach[1]
    assert abs(reach[0] - reach[2]) < 4.0


def test_rough_keeps_the_size_but_not_the_border(blob: np.ndarray) -> None:
    change = []
    for seed in range(10):
        out = synthetic.rough(blob, None, SPACING, np.random.default_rng(seed), 1.0)
        change.append(out.sum() / blob.sum())
        assert 0.5 < dice(out, blob) < 1
        assert out[20, 19, 10]
    assert np.mean(change) == pytest.approx(1, abs=0.15)


def test_cut_only_removes_and_leaves_a_part(blob: np.ndarray) -> None:
    for seed in range(12):
        out = synthetic.cut(blob, None, SPACING, np.random.default_rng(seed), 1.0)
        assert (out <= blob).all()
        assert 0.3 * blob.sum() < out.sum() < blob.sum()


def test_merge_joins_neighbours() -> None:
    mask = np.zeros((40, 30, 16), bool)
    mask[8:18, 8:20, 4:12] = True
    mask[20:30, 8:20, 4:12] = True
    joined = 0
    for seed in range(8):
        out = synthetic.merge(mask, None, SPACING, np.random.default_rng(seed), 1.0)
        assert (out >= mask).all()
        joined += components(out, SPACING)[1].size == 1
    assert joined >= 6


def test_leak_follows_bright_neighbours() -> None:
    mask = np.zeros((30, 30, 12), bool)
    mask[8:18, 8:20, 3:9] = True
    image = np.where(mask, 0.6, 0.2).astype(np.float32)
    image[18:26, 8:20, 3:9] = 0.6  # as bright, next to it
    extra = np.zeros_like(mask)
    for seed in range(12):
        extra |= synthetic.leak(mask, image, SPACING, np.random.default_rng(seed), 1.0) & ~mask
    assert extra.any()
    assert (image[extra] > 0.5).all()
    assert np.array_equal(synthetic.leak(mask, None, SPACING, np.random.default_rng(0), 1.0), mask)


def test_shift_moves_by_at_most_three_voxels(blob: np.ndarray) -> None:
    for seed in range(8):
        out = synthetic.shift(blob, None, SPACING, np.random.default_rng(seed), 1.0)
        moved = (np.argwhere(out).mean(0) - np.argwhere(blob).mean(0)) * SPACING
        assert np.abs(moved).max() <= 6.5
        assert 0.5 < out.sum() / blob.sum() < 1.6


def test_shift_does_not_cut_large_objects_flat() -> None:
    i, j, k = np.mgrid[-75:75, -25:25, -25:25]
    long = (i / 60) ** 2 + (j / 15) ** 2 + (k / 15) ** 2 <= 1
    for seed in range(12):
        out = synthetic.shift(long, None, (1.0, 1.0, 1.0), np.random.default_rng(seed), 1.0)
        areas = out.sum(axis=(1, 2))
        # the outermost slices of an ellipsoid, moved and scaled, are small discs
        assert areas[np.flatnonzero(areas)[[0, -1]]].max() < 0.06 * areas.max()


def test_drop_slices_changes_whole_slices(blob: np.ndarray) -> None:
    touched = 0
    for seed in range(10):
        out = synthetic.drop_slices(blob, None, SPACING, np.random.default_rng(seed), 1.0)
        for k in range(blob.shape[2]):
            same = [np.array_equal(out[:, :, k], s) for s in (blob[:, :, k], blob[:, :, k - 1])]
            assert any(same) or not out[:, :, k].any()
        touched += not np.array_equal(out, blob)
    assert touched > 5


def test_soften_gives_probabilities_that_keep_the_mask(blob: np.ndarray) -> None:
    for seed in range(6):
        p = soften(blob, SPACING, np.random.default_rng(seed))
        assert p.dtype == np.float32
        assert np.isfinite(p).all()
        assert p.min() >= 0
        assert p.max() <= 1
        assert dice(p > 0.5, blob) > 0.93
        assert p[0, 0, 0] < 0.01
    assert not soften(np.zeros_like(blob), SPACING, np.random.default_rng(0)).any()
    assert soften(np.ones_like(blob), SPACING, np.random.default_rng(0)).all()


def test_the_pair_of_a_mask_differs_by_what_is_asked(blob: np.ndarray) -> None:
    alike, apart = [], []
    for seed in range(8):
        for difference, found in ((0.0, alike), (2.5, apart)):
            ssl, sam = soft_pair(blob, SPACING, np.random.default_rng(seed), difference)
            assert dice(ssl > 0.5, blob) > 0.93
            found.append(dice(ssl > 0.5, sam > 0.5))
    assert np.mean(alike) > 0.95
    assert np.mean(apart) < np.mean(alike) - 0.03


def test_corrupt_is_deterministic_and_keeps_the_nesting(blob: np.ndarray, picture: np.ndarray) -> None:
    inner = np.zeros_like(blob)
    inner[17:22, 17:22, 9:12] = True
    regions = np.stack([blob, inner])
    for seed in range(15):
        rng = np.random.default_rng(seed)
        out = corrupt(regions, picture, PAIR, SPACING, rng, 1.0)
        assert out.shape == regions.shape
        assert out.dtype == bool
        assert (out[0] >= out[1]).all()
        again = corrupt(regions, picture, PAIR, SPACING, np.random.default_rng(seed), 1.0)
        assert np.array_equal(out, again)
    assert np.array_equal(corrupt(regions, picture, PAIR, SPACING, np.random.default_rng(0), 0.0), regions)


def tumours(seed: int) -> np.ndarray:
    """Lesions of the sizes of docs/science.md §6.1 (lognormal, median 10.5 mm), 64 x 64 x 16 voxels of 2 x 2 x 5 mm."""
    rng = np.random.default_rng(seed)
    shape, spacing = (64, 64, 16), np.array([2.0, 2.0, 5.0])
    mm = np.indices(shape).reshape(3, -1).T * spacing
    mask = np.zeros(shape, bool)
    for _ in range(int(rng.integers(1, 5))):
        radius = np.clip(rng.lognormal(2.35, 0.45), 4, 24)
        centre = rng.uniform(0.25, 0.75, 3) * np.array(shape) * spacing
        form = (((mm - centre) / (radius * rng.uniform(0.8, 1.25, 3))) ** 2).sum(1).reshape(shape)
        mask |= form + 0.25 * random_field(shape, (2.0, 2.0, 5.0), radius / 2, rng) <= 1
    return mask


def test_errors_are_as_large_as_those_of_networks() -> None:
    rng = np.random.default_rng(0)
    lesions = [tumours(seed) for seed in range(25)]
    found = [dice(corrupt_region(m, None, (2.0, 2.0, 5.0), rng, draw_severity(rng)), m) for m in lesions * 3]
    assert np.mean(found) == pytest.approx(0.6, abs=0.1)
    low, high = np.quantile(found, [0.1, 0.9])
    assert low <= 0.3
    assert high >= 0.85


def test_large_organs_are_spoiled_less() -> None:
    organ = np.indices((56, 50, 18)).reshape(3, -1).T - [28, 25, 9]
    mask = ((organ / [24, 21, 7]) ** 2).sum(1).reshape(56, 50, 18) <= 1  # semi-axes 48, 42, 35 mm
    rng = np.random.default_rng(1)
    found = [dice(corrupt_region(mask, None, (2.0, 2.0, 5.0), rng, draw_severity(rng)), mask) for _ in range(80)]
    assert 0.75 < np.mean(found) < 0.95
