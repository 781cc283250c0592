import numpy as np
import pytest

from aslseg.settings import Settings
from aslseg.volume.intensity import normalise

CT = Settings(window_low=-100, window_high=300)
MR = Settings(modality="mr")


def test_ct_window_is_fixed():
    found = normalise(np.array([-1000, -100, 100, 300, 3000], np.int16), CT)
    assert found.dtype == np.float32
    assert found.tolist() == [0, 0, 0.5, 1, 1]
    # what else is in the scan does not matter
    assert normalise(np.array([100.0]), CT)[0] == 0.5


def test_mr_percentiles_leave_the_empty_background_out():
    tissue = np.linspace(100, 1100, 10001)
    scan = np.concatenate([np.zeros(50000), tissue])
    found = normalise(scan, MR)
    assert found[0] == 0
    assert found[50000:][5000] == pytest.approx(0.5, abs=1e-3)
    assert found[50000:][50] == pytest.approx(0, abs=1e-3)
    assert found[-51] == pytest.approx(1, abs=1e-3)
    assert found.max() == 1


def test_mr_scale_and_offset_of_the_scanner_do_not_matter():
    scan = np.random.default_rng(0).random((10, 10, 10)) + 1
    assert np.allclose(normalise(scan, MR), normalise(scan * 700, MR), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_scans_are_finite(value):
    found = normalise(np.full((4, 4, 4), value), MR)
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1
