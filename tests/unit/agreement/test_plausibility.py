"""Shape and place of masks against those of human labels, and when they count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aslseg.agreement.measures import Agreement
from aslseg.agreement.plausibility import Reference, Shapes, case_features, implausible, learned, reference
from aslseg.agreement.promotion_rules import judge
from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid

LABELS = Labels.parse("organ,lesion", "lesion:organ")
ORGAN = Labels.parse("organ")
SPACING = (2.0, 2.0, 3.0)
SHAPE = (40, 36, 24)


def scan() -> np.ndarray:
    """A body with air around it."""
    image = np.zeros(SHAPE, np.float32)
    image[4:36, 4:32] = 0.5
    return image


def organ(rng: np.random.Generator, spread: float = 1.0) -> np.ndarray:
    """An ellipsoid, tilted and off the middle, that varies a little; in voxels."""
    i, j, k = np.indices(SHAPE, float)
    centre = np.array([14, 18, 12]) + spread * rng.normal(0, 0.7, 3)
    radii = np.array([8, 6, 7]) * np.exp(spread * rng.normal(0, 0.05, 3))
    x, y, z = i - centre[0], j - centre[1] - 0.4 * (i - centre[0]), k - centre[2]
    return np.asarray((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2 <= 1)


def prepared(mask: np.ndarray, n: int = 0) -> Prepared:
    grid = Grid.of(Volume(scan(), np.diag([*SPACING, 1.0])), None)
    return Prepared(str(n), str(n), scan(), grid, mask.astype(np.uint8))


def labels_of(count: int, seed: int = 0, spread: float = 1.0) -> list[Prepared]:
    rng = np.random.default_rng(seed)
    return [prepared(organ(rng, spread), n) for n in range(count)]


def judged(mask: np.ndarray, seen: Reference) -> tuple[list[str], list[str]]:
    return implausible(mask.astype(np.uint8), scan(), SPACING, seen, ORGAN)


def test_features_by_hand() -> None:
    mask = np.zeros(SHAPE, bool)
    mask[4:14, 4:24, 0:12] = True
    values = case_features(scan(), mask[None], SPACING, ORGAN)["organ"]
    assert values[0] == pytest.approx(np.log(10 * 20 * 12 * 12.0))
    np.testing.assert_allclose(values[1:4], np.log([20, 40, 36]), atol=0.11)  # two percent may lie outside
    # the body reaches from 4 to 35 and from 4 to 31, and over all slices
    np.testing.assert_allclose(values[4:7], [4.5 / 31, 9.5 / 27, 5.5 / 23], atol=0.02)
    assert values[7] == pytest.approx(np.log(40 / 20), abs=0.01)
    np.testing.assert_allclose(values[8:], 0, atol=1e-9)


def test_a_mirrored_mask_has_the_other_tilt_and_lesions_have_no_shape() -> None:
    mask = organ(np.random.default_rng(1)).astype(np.uint8)
    mask[14:18, 17:20, 10:13] = 2
    there, mirrored = (case_features(scan(), LABELS.regions(m), SPACING, LABELS) for m in (mask, mask[::-1]))
    assert set(there) == {"organ"}
    assert there["organ"][8] == pytest.approx(-mirrored["organ"][8])
    assert abs(there["organ"][8]) > 0.2


def test_scans_of_one_patient_do_not_judge_each_other() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (12, 14))
    rows[:2] = rows[2:].mean(0)
    rows[:2, 3] += 60
    assert learned(rows).rejected == 0
    assert learned(rows, ["a", "a", *"bcdefghijk"]).rejected == pytest.approx(2 / 12)


def test_enough_labels_that_are_alike_make_a_guard_that_vetoes() -> None:
    seen = reference(labels_of(12), ORGAN)
    assert seen.shapes["organ"].trusted
    assert seen.shapes["organ"].rejected <= 0.05
    fine = organ(np.random.default_rng(99))
    assert judged(fine, seen) == ([], [])
    for wrong in (fine[::-1], np.roll(fine, 10, 1), fine.transpose(1, 0, 2)[:36].repeat(2, 0)[:40, :36]):
        reasons, flags = judged(np.resize(wrong, SHAPE), seen)
        assert "organ: unlike the 12 human labels in shape or place" in reasons
        assert not flags


def test_few_labels_only_send_a_mask_to_a_person() -> None:
    seen = reference(labels_of(5), ORGAN)
    assert not seen.shapes["organ"].trusted
    reasons, flags = judged(np.roll(organ(np.random.default_rng(99), 0), 18, 1), seen)
    assert reasons == []
    assert flags == ["organ: unlike the 5 human labels in shape or place: worth a look"]
    assert reference(labels_of(3), ORGAN).shapes == {}


def test_a_guard_that_would_reject_true_masks_never_vetoes() -> None:
    # every fifth human label is unlike all others in its own way
    rows = np.random.default_rng(3).normal(0, 1, (20, 14))
    rows[[0, 5, 10, 15], [1, 4, 8, 12]] += 40
    found = learned(rows)
    assert found.rejected > 0.05
    assert not found.trusted
    seen = reference(labels_of(12), ORGAN)
    odd = replace(seen, shapes={"organ": replace(seen.shapes["organ"], rejected=0.1)})
    reasons, flags = judged(organ(np.random.default_rng(99))[::-1], odd)
    assert reasons == []
    assert len(flags) == 1


def test_equal_labels_do_not_make_every_mask_strange() -> None:
    same = [prepared(organ(np.random.default_rng(5)), n) for n in range(10)]
    seen = reference(same, ORGAN)
    assert seen.shapes["organ"].rejected == 0
    assert judged(organ(np.random.default_rng(5)), seen) == ([], [])


@pytest.mark.parametrize("count", [4, 8, 40])
def test_labels_of_one_kind_are_rarely_rejected(count: int) -> None:
    rng = np.random.default_rng(count)
    mixing = rng.normal(0, 1, (14, 14))
    rejected = []
    for _ in range(20):
        rows = rng.normal(0, 1, (count + 20, 14)) @ mixing
        shapes = Shapes.of(rows[:count])
        rejected += [shapes.excess(row) > 1 for row in rows[count:]]
    assert np.mean(rejected) < 0.05


def test_the_verdict_has_reasons_and_flags() -> None:
    settings, agreed = Settings(labels="organ"), Agreement({"organ": 1.0}, 1.0)
    mask = organ(np.random.default_rng(99))[::-1].astype(np.uint8)
    few, many = (reference(labels_of(n), ORGAN) for n in (5, 12))
    assert judge(agreed, mask, SPACING, few, settings, image=scan()).promote
    assert judge(agreed, mask, SPACING, few, settings, image=scan()).flags[0].endswith("worth a look")
    assert not judge(agreed, mask, SPACING, many, settings, image=scan()).promote
    # without its scan a mask has no place
    assert judge(agreed, mask, SPACING, many, settings).promote
    assert not judge(agreed, mask, SPACING, few, settings, image=scan()).against("a veto").promote
