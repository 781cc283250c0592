"""Lesion-wise measures on hand-made masks."""

import numpy as np
import pytest

from aslseg.agreement.lesions import count_lesions

SHAPE = (12, 12, 12)


def mask(*boxes):
    out = np.zeros(SHAPE, bool)
    for box in boxes:
        out[tuple(slice(a, b) for a, b in box)] = True
    return out


CUBE = ((1, 4), (1, 4), (1, 4))
FAR = ((8, 11), (8, 11), (8, 11))


@pytest.mark.parametrize(
    ("pred", "truth", "counts", "recall", "precision", "f1"),
    [
        (mask(CUBE), mask(CUBE), (1, 1, 1, 0), 1, 1, 1),
        (mask(CUBE, FAR), mask(CUBE), (1, 1, 2, 1), 1, 0.5, 2 / 3),
        (mask(CUBE), mask(CUBE, FAR), (2, 1, 1, 0), 0.5, 1, 2 / 3),
        (mask(FAR), mask(CUBE), (1, 0, 1, 1), 0, 0, 0),
        (mask(), mask(CUBE), (1, 0, 0, 0), 0, None, 0),
        (mask(CUBE), mask(), (0, 0, 1, 1), None, 0, 0),
        (mask(), mask(), (0, 0, 0, 0), None, None, None),
    ],
    ids=["same", "one false", "one missed", "elsewhere", "no prediction", "no truth", "neither"],
)
def test_found_missed_and_false(pred, truth, counts, recall, precision, f1):
    found = count_lesions(pred, truth)
    assert (found.true, found.found, found.predicted, found.false) == counts
    assert (found.recall, found.precision) == (recall, precision)
    assert found.f1 == (None if f1 is None else pytest.approx(f1))


def test_one_voxel_of_overlap_counts_as_found():
    found = count_lesions(mask(((3, 6), (3, 6), (3, 6))), mask(CUBE))
    assert (found.found, found.false) == (1, 0)
    assert count_lesions(mask(((4, 6), (3, 6), (3, 6))), mask(CUBE)).found == 0


def test_corners_join_components():
    diagonal = mask(((1, 2), (1, 2), (1, 2)), ((2, 3), (2, 3), (2, 3)))
    assert count_lesions(diagonal, diagonal).true == 1
    apart = mask(((1, 2), (1, 2), (1, 2)), ((3, 4), (1, 2), (1, 2)))
    assert count_lesions(apart, apart).true == 2


def test_a_prediction_over_two_lesions_finds_both():
    truth = mask(((1, 2), (1, 2), (1, 2)), ((1, 2), (1, 2), (5, 6)))
    found = count_lesions(mask(((1, 2), (1, 2), (1, 6))), truth)
    assert (found.true, found.found, found.predicted, found.false) == (2, 2, 1, 0)


def test_masks_of_different_shapes():
    with pytest.raises(ValueError, match="one shape"):
        count_lesions(np.zeros((2, 2, 2), bool), np.zeros((2, 2, 3), bool))
