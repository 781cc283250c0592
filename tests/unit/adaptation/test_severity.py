"""Severities at which synthetic errors have a wanted Dice."""

from __future__ import annotations

import numpy as np
import pytest

from aslseg.adaptation import severity
from aslseg.adaptation.severity import LEAST, MOST, Truth, calibrate, median_dice


def lesions(seed: int) -> np.ndarray:
    """One to three balls of 6 to 16 mm, in 40 x 40 x 16 voxels of 2 x 2 x 5 mm."""
    rng = np.random.default_rng(seed)
    mm, mask = np.indices((40, 40, 16)).T * (2.0, 2.0, 5.0), np.zeros((40, 40, 16), bool)
    for _ in range(int(rng.integers(1, 4))):
        centre = rng.uniform(0.3, 0.7, 3) * (80, 80, 80)
        mask |= (((mm - centre) ** 2).sum(-1) <= rng.uniform(6, 16) ** 2).T
    return mask


def test_calibrated_errors_have_the_median_dice_that_was_asked_for() -> None:
    """Also one that the harshest single errors do not reach."""
    truths = [Truth.around(lesions(seed), None, (2.0, 2.0, 5.0)) for seed in range(6)]
    most = calibrate(truths, 0.4, np.random.default_rng(0))
    assert most > 1
    # by other errors than those it was fitted on
    assert median_dice(truths, most, 5, 100) == pytest.approx(0.4, abs=0.05)


def test_a_large_scan_is_thinned_and_its_errors_stay_as_large() -> None:
    mask = np.zeros((64, 60, 40), bool)
    mask[12:50, 14:46, 8:34] = True
    whole, thinned = Truth(mask, None, (1.5, 1.5, 2.0)), Truth.around(mask, mask.astype(np.float32), (1.5, 1.5, 2.0))
    assert thinned.mask.size <= severity.CALIBRATED_VOXELS < mask.size
    assert thinned.image is not None
    # nothing keeps the whole scan in memory
    assert thinned.mask.base is None
    assert thinned.image.base is None
    np.testing.assert_array_equal(thinned.image > 0.5, thinned.mask)
    assert median_dice([thinned], 1.0, 1, 24) == pytest.approx(median_dice([whole], 1.0, 1, 24), abs=0.05)


def test_calibration_ends_where_errors_can_be_no_milder_or_harsher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(severity, "CALIBRATION_DRAWS", 6)
    truths = [Truth.around(lesions(0), None, (2.0, 2.0, 5.0))]
    assert calibrate(truths, 2.0, np.random.default_rng(0)) == pytest.approx(LEAST, abs=0.03)
    assert calibrate(truths, -1.0, np.random.default_rng(0)) == pytest.approx(MOST, abs=0.03)
