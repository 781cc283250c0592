import warnings

import numpy as np
import pytest

from aslseg.agreement.measures import compare, hd95, score, surface_distances
from aslseg.compute.overlap import dice
from aslseg.types import Labels

LABELS = Labels.parse("liver,tumour", "tumour:liver")


def box(low, high, shape=(12, 12, 12)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


def blob(seed):
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(np.random.default_rng(seed).standard_normal((20, 18, 12)), 2)
    return field > np.quantile(field, 0.8)


CUBE, SHIFTED = box((2, 2, 2), (6, 6, 6)), box((3, 2, 2), (7, 6, 6))


def test_shifted_cube_by_hand():
    # 48 of 64 voxels are shared. The surface has 64 - 8 = 56 voxels; those of the left face (16) are one voxel from
    # the other's left face, the inner 4 of the right face one voxel from its walls, all others on it.
    found = score(CUBE, SHIFTED, None)
    assert found == {
        "dice": 0.75,
        "jaccard": pytest.approx(48 / 80),
        "sensitivity": 0.75,
        "specificity": pytest.approx((CUBE.size - 80) / (CUBE.size - 64)),
        **dict.fromkeys(("hd", "hd95", "hd95_max"), 1.0),
        **dict.fromkeys(("asd", "assd"), pytest.approx(20 / 56)),
        "flags": [],
    }


def test_shifted_cube_in_anisotropic_millimetres():
    # along the shift a voxel is 2 mm: the left face is 2 mm away, the inner right face 1 mm (sideways)
    found = score(CUBE, SHIFTED, (2.0, 1.0, 1.0))
    assert found["asd"] == pytest.approx((16 * 2 + 4 * 1) / 56)
    assert found["hd95"] == 2.0
    assert found["dice"] == 0.75


def test_spacing_follows_the_axes():
    a, b = box((1, 1, 1), (2, 2, 2)), box((4, 5, 1), (5, 6, 2))
    assert score(a, b, None)["asd"] == pytest.approx(5)
    assert score(a, b, (2.0, 1.0, 9.0))["hd95"] == pytest.approx(np.hypot(6, 4))


def test_single_voxel_is_its_own_surface():
    found = score(box((0, 0, 0), (1, 1, 1)), box((0, 0, 0), (1, 1, 1)), (1.0, 2.0, 3.0))
    assert (found["dice"], found["hd95"], found["asd"]) == (1.0, 0.0, 0.0)


def test_outside_the_array_is_background():
    full = np.ones((4, 4, 4), bool)
    forth, back = surface_distances(full, full, None)
    assert len(forth) == len(back) == 64 - 8


def test_pooled_percentile_is_not_the_larger_directed_one():
    forth, back = np.zeros(80), np.full(20, 10.0)
    assert hd95(forth, back) == 10
    assert hd95(np.zeros(99), np.array([10.0])) == 0


# medpy 0.5.2's dc, jc, hd95(p, t), asd(p, t), run once on these masks; MONAI's HD95 gives 6.164414 for the first.
@pytest.mark.parametrize(
    ("seeds", "spacing", "expected"),
    [
        ((1, 2), None, (0.208333, 0.116279, 5.937060, 2.227822)),
        ((1, 2), (1.0, 1.5, 4.0), (0.208333, 0.116279, 8.485281, 3.277826)),
        ((3, 4), None, (0.158565, 0.086109, 5.084167, 2.050198)),
        ((3, 4), (1.0, 1.5, 4.0), (0.158565, 0.086109, 8.537403, 3.100395)),
        ((5, 6), (1.0, 1.5, 4.0), (0.349537, 0.211781, 8.202890, 2.906485)),
    ],
)
def test_same_numbers_as_medpy(seeds, spacing, expected):
    found = score(blob(seeds[0]), blob(seeds[1]), spacing)
    assert [found[k] for k in ("dice", "jaccard", "hd95", "asd")] == pytest.approx(expected, abs=2e-6)


def test_same_numbers_as_medpy_at_the_border_and_with_an_outlier():
    found = score(box((0, 0, 0), (4, 4, 4)), box((2, 2, 2), (9, 9, 9)), (1.0, 2.0, 3.0))
    assert (found["hd95"], found["asd"]) == pytest.approx((16.942497, 3.756346), abs=1e-5)
    stray = CUBE.copy()
    stray[11, 11, 11] = True
    larger = box((2, 2, 2), (8, 8, 8))
    assert score(stray, larger, None)["asd"] == pytest.approx(0.577688, abs=1e-5)


def test_asd_runs_from_prediction_to_truth_only():
    stray = CUBE.copy()
    stray[11, 11, 11] = True
    # the truth's surface lies on the prediction's, but the stray voxel is far from the truth
    assert score(CUBE, stray, None)["asd"] == 0
    assert score(stray, CUBE, None)["asd"] == pytest.approx(np.sqrt(3) * 6 / 57)


def test_empty_masks_are_flagged_and_have_no_distance():
    nothing = np.zeros_like(CUBE)
    assert score(nothing, nothing, None) == {
        "dice": 1.0,
        "jaccard": 1.0,
        "sensitivity": None,
        "specificity": 1.0,
        **dict.fromkeys(("hd", "hd95", "hd95_max", "asd", "assd")),
        "flags": ["empty in both"],
    }
    assert score(nothing, CUBE, None) == {
        "dice": 0.0,
        "jaccard": 0.0,
        "sensitivity": 0.0,
        "specificity": 1.0,
        **dict.fromkeys(("hd", "hd95", "hd95_max", "asd", "assd")),
        "flags": ["empty prediction"],
    }
    assert score(CUBE, nothing, None)["flags"] == ["empty truth"]
    with pytest.raises(ValueError, match="not empty"):
        surface_distances(nothing, CUBE, None)


def test_no_warnings_reach_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(CUBE, SHIFTED, (1.0, 1.0, 1.0))


def test_dice_of_masks():
    assert dice(CUBE, SHIFTED) == 0.75
    assert dice(CUBE, CUBE) == 1
    assert dice(CUBE, np.zeros_like(CUBE)) == 0
    assert dice(np.zeros_like(CUBE), np.zeros_like(CUBE)) is None
    with pytest.raises(ValueError, match="one shape"):
        dice(CUBE, CUBE[1:])


def test_compare_is_per_class_over_the_whole_volume():
    a, b = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    a[:2], b[:2] = 1, 1
    a[0, 0, :2], b[0, 0, 1:3] = 2, 2
    found = compare(a, b, LABELS)
    # liver: 30 voxels each, 29 shared; tumour: 2 each, 1 shared
    assert found.per_label == {"liver": pytest.approx(2 * 29 / 60), "tumour": 0.5}
    assert found.mean == pytest.approx((29 / 30 + 0.5) / 2)
    assert found.flags == ()


def test_compare_with_empty_labels():
    a, b = np.ones((3, 3, 3), np.uint8), np.ones((3, 3, 3), np.uint8)
    found = compare(a, b, LABELS)
    assert found.per_label == {"liver": 1.0, "tumour": None}
    assert (found.mean, found.flags) == (1.0, ("tumour: empty in both",))
    b[0, 0, 0] = 2
    found = compare(a, b, LABELS)
    assert found.per_label["tumour"] == 0.0
    assert found.flags == ("tumour: empty in the first",)
    assert compare(b, a, LABELS).flags == ("tumour: empty in the second",)


def test_compare_with_nothing_at_all():
    nothing = np.zeros((3, 3, 3), np.uint8)
    found = compare(nothing, nothing, LABELS)
    assert found.mean == 1.0
    assert found.flags[-1] == "all labels are empty in both"


def test_compare_refuses_what_is_no_class_map():
    with pytest.raises(ValueError, match=r"values 0\.\.2, got"):
        compare(np.full((2, 2, 2), 3), np.zeros((2, 2, 2), np.uint8), LABELS)
    with pytest.raises(ValueError, match=r"values 0\.\.2"):
        compare(np.full((2, 2, 2), np.nan), np.zeros((2, 2, 2), np.uint8), LABELS)


def test_every_measure_of_two_shifted_cubes():
    """Two cubes of 4 x 4 x 4 voxels, one moved by two along the first axis; all counted by hand."""
    pred, truth = np.zeros((10, 8, 8), bool), np.zeros((10, 8, 8), bool)
    truth[2:6, 2:6, 2:6] = True
    pred[4:8, 2:6, 2:6] = True
    found = score(pred, truth, (1.5, 1, 1))
    assert (found["dice"], found["jaccard"], found["sensitivity"]) == (0.5, pytest.approx(1 / 3), 0.5)
    assert found["specificity"] == pytest.approx((640 - 64 - 32) / (640 - 64))
    assert found["hd"] == found["hd95_max"] == 3.0
    assert found["asd"] == found["assd"]  # by symmetry
    whole = score(pred[2:8, 2:6, 2:6], truth[2:8, 2:6, 2:6], (1.5, 1, 1), voxels=640)
    assert whole["specificity"] == found["specificity"]


def test_directed_distances_differ_where_one_mask_has_a_spur():
    truth = np.zeros((40, 5, 5), bool)
    truth[:4, 1:4, 1:4] = True
    pred = truth.copy()
    pred[4:34, 2, 2] = True
    found = score(pred, truth, None)
    assert found["hd"] == 30
    assert found["hd95_max"] > found["hd95"] > 0
    # back from the truth, only the voxel under the spur, which is no surface of the prediction, is one voxel away
    assert found["assd"] == pytest.approx((found["asd"] + 1 / 34) / 2)


def test_rates_of_empty_masks():
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    found = [score(a, b, None) for a, b in ((empty, empty), (full, empty), (empty, full), (full, full))]
    assert [f["sensitivity"] for f in found] == [None, None, 0, 1]
    assert [f["specificity"] for f in found] == [1, 0, None, None]
    assert all(f["hd"] is f["assd"] is f["hd95_max"] is None for f in found[:3])
