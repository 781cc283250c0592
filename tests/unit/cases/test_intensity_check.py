"""Scans that are not in HU, or unlike the labelled ones, on phantoms."""

import numpy as np
import pytest

from aslseg.cases.intensity_check import unusual_intensities
from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings
from aslseg.volume.intensity import normalise
from aslseg.volume.phantom import make_phantom

CT, MR = Settings(modality="ct"), Settings(modality="mr")
HU = [make_phantom(0, n, shape=(48, 48, 16))[0].array for n in range(5)]
CHANGED = {
    "rescale intercept lost": lambda a: a + 1024,
    "lost, padded with -2000": lambda a: np.where(np.indices(a.shape)[0] < 3, -2000, a) + 1024,
    "scaled to 0..1": lambda a: ((a + 160) / 400).clip(0, 1),
    "scaled to 0..255": lambda a: ((a + 160) / 400).clip(0, 1) * 255,
    "ten times too large": lambda a: a * 10,
    "MR": lambda a: np.where(a < -500, 0, 300 + a / 2),
    "one value": lambda a: np.full_like(a, 40),
}
HARMLESS = {
    "as it is": lambda a: a,
    "clipped to -45..160": lambda a: a.clip(-45, 160),
    "half of the field of view": lambda a: a[12:36, 12:36],
    "with metal": lambda a: np.where((np.indices(a.shape)[0] == 24) & (a > 0), 3000, a),
    "another scanner": lambda a: a + 25,
    "noise": lambda a: a + np.random.default_rng(0).normal(0, 30, a.shape),
}


def prepared(name, array, settings):
    return Prepared(name, name, normalise(array, settings), None)


def check(labelled, unlabelled, settings=CT, confirmed=()):
    groups = [
        [prepared(f"{kind}{n}", array, settings) for n, array in enumerate(arrays)]
        for kind, arrays in (("l", labelled), ("u", unlabelled))
    ]
    return unusual_intensities(*groups, settings, confirmed)


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED.keys())
def test_a_scan_that_is_not_in_hounsfield_units_is_left_out(change):
    found, warnings = check(HU[:3], [HU[3], change(HU[4])])
    assert list(found) == ["u1"]
    assert found["u1"].startswith("u1: ")
    assert "patients.csv" in found["u1"]
    assert warnings == []


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_ordinary_differences_are_passed_over(change):
    assert check(HU[:3], [HU[3], change(HU[4])]) == ({}, [])


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED.keys())
def test_a_confirmed_scan_stays(change):
    assert check(HU[:3], [HU[3], change(HU[4])], confirmed={"u1"}) == ({}, [])


@pytest.mark.parametrize("name", ["rescale intercept lost", "scaled to 0..1", "MR"])
def test_where_all_are_strange_the_settings_are(name):
    found, (warning,) = check([CHANGED[name](a) for a in HU[:2]], [CHANGED[name](a) for a in HU[2:4]])
    assert found == {}
    assert "2 of 2 labelled scans do not look like Hounsfield units (l0: " in warning
    assert "modality = mr" in warning


def test_a_labelled_scan_can_be_the_strange_one():
    assert list(check([*HU[:3], HU[3] + 1024], [HU[4]])[0]) == ["l3"]


def test_mr_scans_are_compared_with_each_other():
    mr = [np.where(a < -500, 0, 300 + a / 2) for a in HU]
    assert check(mr[:3], mr[3:], MR) == ({}, [])
    assert check(mr[:3], [mr[3] * 7, mr[4] / 3], MR) == ({}, [])  # MR has no unit
    segmentation = (HU[4] > 50).astype(np.float32)
    assert list(check(mr[:3], [mr[3], segmentation], MR)[0]) == ["u1"]


def test_one_labelled_scan_is_too_few_to_compare_with():
    assert check(HU[:1], [np.where(HU[1] > 0, 100, -100.0)]) == ({}, [])
