"""Limits on components of nested labels: how they are fitted, and what they take away."""

from __future__ import annotations

import numpy as np
import pytest

from aslseg.ssl import specks
from aslseg.types import Labels

LABELS = Labels.parse("liver,tumour", "tumour:liver")
SHAPE = (24, 24, 12)
SPACING = (2.0, 2.0, 2.5)  # 10 mm3 a voxel


def scan(patient: str, *, lesion: bool = True, speck: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Region probability of a tumour that is found with 0.97 and of a speck of one voxel, and the truth."""
    p, truth = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool)
    if lesion:
        p[4:8, 4:8, 4:8], truth[4:8, 4:9, 4:8] = 0.97, True
    p[18, 18, 6] = speck
    return p, truth


def scans(*patients: str, **options: object) -> list[specks.Scan]:
    return [specks.Scan.of(name, *scan(name, **options), SPACING) for name in patients]  # type: ignore[arg-type]


def test_specks_that_are_never_right_are_taken_away_by_the_lowest_limits_that_do_it():
    limits = specks.fit([*scans("a", "b"), *scans("c", lesion=False)])
    assert limits == specks.Limits(0.0, 30.0)
    with_limits, without = scans("a")[0].score(limits), scans("a")[0].score(specks.Limits(0.0, 0.0))
    assert with_limits > without
    assert scans("c", lesion=False)[0].score(limits) == 1
    assert scans("c", lesion=False)[0].score(specks.Limits(0.0, 0.0)) == 0


def test_specks_that_are_lesions_stay():
    found = []
    for name in "abc":
        p, truth = scan(name)
        truth[18, 18, 6] = True
        found.append(specks.Scan.of(name, p, truth, SPACING))
    assert specks.fit(found) == specks.Limits(0.0, 0.0)


def one(patient: str, *, lesion: int, larger: bool = False) -> specks.Scan:
    """A scan with a true lesion of some voxels that is found with 0.75, and a larger false one that is surer."""
    p, truth = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool)
    p[2, 2, 1 : 1 + lesion], truth[2, 2, 1 : 1 + lesion] = 0.75, True
    if larger:
        p[12:16, 12:16, 5:9] = 0.93
    return specks.Scan.of(patient, p, truth, SPACING)


def test_limits_that_delete_the_true_lesions_are_not_admitted():
    healthy = [one(f"healthy{n}", lesion=0, larger=True) for n in range(6)]
    # the best mean score is that of a model that never finds anything
    assert specks.fit([one("a", lesion=3), one("b", lesion=3), *healthy]) == specks.Limits(0.0, 0.0)
    # patients who keep a lesion are enough, but most of the lesions are gone
    small = [one(name, lesion=2) for name in "abc"]
    large = [one(name, lesion=10) for name in "de"]
    false = [one(f"healthy{n}", lesion=0) for n in range(2)]
    speck = np.zeros(SHAPE, np.float32)
    speck[18, 18, 2:8] = 0.75
    false += [specks.Scan.of(f"speck{n}", speck, np.zeros(SHAPE, bool), SPACING) for n in range(9)]
    limits = specks.fit([*small, *large, *false])
    assert limits == specks.Limits(0.0, 0.0)
    assert specks.fit([*small[:2], *large, *false]) == specks.Limits(0.0, 100.0)


def test_nothing_is_fitted_to_the_lesions_of_one_patient_or_of_none():
    assert specks.fit([*scans("a", "a"), *scans("b", lesion=False)]) is None
    assert specks.fit(scans("a", "b", lesion=False)) is None
    assert specks.fit([]) is None


def probabilities(region: np.ndarray) -> np.ndarray:
    """Class probabilities of tumour regions in a liver that is everywhere."""
    p = np.zeros((3, *SHAPE), np.float32)
    p[0] = 0.01
    p[2] = region * 0.99
    p[1] = 0.99 - p[2]
    return p


@pytest.mark.parametrize(
    ("limits", "gone"), [({"probability": 0.0, "mm3": 30.0}, 1), ({"probability": 0.9, "mm3": 0.0}, 1), ({}, 0)]
)
def test_what_lies_below_the_limits_becomes_the_label_around_it(limits: dict[str, float], gone: int):
    region, _ = scan("a")
    p = probabilities(region)
    before = p.copy()
    assert specks.clear(p, LABELS, {"tumour": limits} if limits else {}, SPACING) == gone
    np.testing.assert_allclose(p.sum(0), before.sum(0), rtol=1e-6)
    found = LABELS.decode(LABELS.region_probabilities(p))
    assert found[18, 18, 6] == (1 if gone else 2)
    assert (found[4:8, 4:8, 4:8] == 2).all()
    changed = (p != before).any(0)
    assert changed.sum() == gone


def test_a_nested_label_goes_with_what_lies_in_it():
    labels = Labels.parse("liver,tumour,necrosis", "tumour:liver,necrosis:tumour")
    p = np.zeros((4, 6, 6, 6), np.float32)
    p[1] = 1
    p[:, 2:4, 2:4, 2:4] = np.array([0, 0.1, 0.6, 0.3])[:, None, None, None]
    p[:, 2, 2, 2] = (0, 0.1, 0.1, 0.8)
    specks.clear(p, labels, {"tumour": {"probability": 0.0, "mm3": 1000.0}}, SPACING)
    assert (labels.decode(labels.region_probabilities(p)) == 1).all()
    np.testing.assert_allclose(p.sum(0), 1, rtol=1e-6)
