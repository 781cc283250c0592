import re

import numpy as np
import pytest

from aslseg.agreement.measures import Agreement
from aslseg.agreement.plausibility import Reference, reference
from aslseg.agreement.promotion_rules import PromotionLimits, Verdict, judge, refusals, select
from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid

LABELS = Labels.parse("liver,tumour", "tumour:liver")
SETTINGS = Settings(promote_threshold="0.9,tumour=0.7")
SPACING = (1.0, 1.0, 2.0)
GOOD = Agreement({"liver": 0.95, "tumour": 0.8}, 0.875)
# the liver of `mask()` has 1000 voxels of 2 mm³, its tumour 8
SEEN = Reference({"liver": (1500.0, 3000.0), "tumour": (10.0, 40.0)}, {"liver": 1, "tumour": 2})


def mask(tumour=2):
    array = np.zeros((20, 20, 20), np.uint8)
    array[2:12, 2:12, 2:12] = 1
    array[4 : 4 + tumour, 4 : 4 + tumour, 4 : 4 + tumour] = 2
    return array


def prepared(label, spacing=SPACING):
    volume = Volume(np.zeros(label.shape, np.float32), np.diag([*spacing, 1.0]))
    return Prepared("x", "x", volume.array, Grid.of(volume, None), label)


def test_reference_measures_regions_in_cubic_millimetres():
    scattered = mask()
    scattered[15, 15, 15] = scattered[18, 18, 18] = 2
    found = reference([prepared(mask()), prepared(scattered), prepared(mask(tumour=0))], LABELS)
    assert found.volumes == {"liver": (2000.0, 2004.0), "tumour": (16.0, 20.0)}
    assert found.components == {"liver": 3, "tumour": 3}


def test_reference_without_a_label_anywhere():
    case = prepared(mask(tumour=0))
    unlabelled = Prepared("u", "u", case.image, case.grid)
    found = reference([case, unlabelled], LABELS)
    assert "tumour" not in found.volumes
    verdict = judge(GOOD, mask(), SPACING, found, SETTINGS)
    assert verdict.reasons == ("tumour: no labelled case holds it",)


def test_good_mask_is_promoted():
    assert judge(GOOD, mask(), SPACING, SEEN, SETTINGS) == Verdict(True, ())
    assert judge(GOOD, mask(), SPACING, SEEN, SETTINGS, shape=(20, 20, 20)).promote


@pytest.mark.parametrize(
    ("agreement", "reason"),
    [
        (Agreement({"liver": 0.89, "tumour": 0.9}, 0.9), "liver: agreement 0.890 below 0.9"),
        (Agreement({"liver": 0.95, "tumour": 0.5}, 0.7), "tumour: agreement 0.500 below 0.7"),
        (Agreement({"liver": 0.95, "tumour": float("nan")}, float("nan")), "tumour: agreement nan below 0.7"),
        (Agreement({"liver": 0.95}, 0.95), "tumour: agreement unknown"),
    ],
)
def test_every_label_must_agree(agreement, reason):
    assert judge(agreement, mask(), SPACING, SEEN, SETTINGS) == Verdict(False, (reason,))


def test_threshold_itself_is_enough():
    assert judge(Agreement({"liver": 0.9, "tumour": 0.7}, 0.8), mask(), SPACING, SEEN, SETTINGS).promote


def test_label_empty_in_both_does_not_block():
    assert judge(Agreement({"liver": 0.95, "tumour": None}, 0.95), mask(tumour=0), SPACING, SEEN, SETTINGS).promote


def test_all_empty_is_never_promoted():
    free = Settings(promote_threshold="0")
    verdict = judge(Agreement({"liver": None, "tumour": None}, 1.0), np.zeros((5, 5, 5), np.uint8), SPACING, SEEN, free)
    assert verdict == Verdict(False, ("mask: empty",))


def test_volume_guard_at_its_borders():
    def volumes(low, high):
        return Reference({"liver": (low, high), "tumour": (10.0, 40.0)}, {"liver": 1, "tumour": 2})

    assert judge(GOOD, mask(), SPACING, volumes(10000.0, 10000.0), SETTINGS).promote
    assert not judge(GOOD, mask(), SPACING, volumes(10001.0, 20000.0), SETTINGS).promote
    assert judge(GOOD, mask(), SPACING, volumes(400.0, 400.0), SETTINGS).promote
    verdict = judge(GOOD, mask(), SPACING, volumes(300.0, 399.0), SETTINGS)
    assert verdict.reasons == ("liver: volume 2.00 ml outside 0.06..2.00 ml",)
    assert not judge(GOOD, np.ones((20, 20, 20), np.uint8), SPACING, SEEN, SETTINGS).promote


def test_too_many_pieces():
    rng = np.random.default_rng(0)
    scattered = np.zeros((40, 40, 40), np.uint8)
    scattered[::4, ::4, ::8] = 1
    chosen = np.flatnonzero(scattered)
    settings = Settings(labels="liver")
    agreement = Agreement({"liver": 1.0}, 1.0)
    seen = Reference({"liver": (10.0, 1000.0)}, {"liver": 1})
    for count, good in ((30, True), (31, False)):
        some = np.zeros(scattered.size, np.uint8)
        some[rng.choice(chosen, count, replace=False)] = 1
        verdict = judge(agreement, some.reshape(scattered.shape), (1, 1, 1), seen, settings)
        assert verdict.promote is good
    assert verdict.reasons == ("liver: 31 pieces, more than 30",)
    many = Reference({"liver": (10.0, 1000.0)}, {"liver": 11})
    assert judge(agreement, some.reshape(scattered.shape), (1, 1, 1), many, settings).promote


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (np.full((4, 4, 4), np.nan), "NaN or infinite"),
        (np.full((4, 4, 4), np.inf), "NaN or infinite"),
        (np.zeros((4, 4)), r"shape \(4, 4\)"),
        (np.zeros((0, 4, 4)), "shape"),
        (np.full((4, 4, 4), 3), r"outside 0\.\.2"),
        (np.full((4, 4, 4), -1), r"outside 0\.\.2"),
        (np.full((4, 4, 4), 0.5), r"outside 0\.\.2"),
        (np.full((4, 4, 4), "a"), "type"),
        (np.full((4, 4, 4), None), "type"),
        (np.full((4, 4, 4), 1j), "type"),
        (np.zeros((4, 4, 4), bool), "empty"),
        (None, "type"),
    ],
)
def test_odd_masks_get_a_reason_not_an_exception(odd, reason):
    verdict = judge(GOOD, odd, SPACING, SEEN, SETTINGS)
    assert not verdict.promote
    assert re.search(reason, verdict.reasons[0])


def test_wrong_shape_and_spacing():
    assert judge(GOOD, mask(), SPACING, SEEN, SETTINGS, shape=(20, 20, 21)).reasons == (
        "mask: shape (20, 20, 20), expected (20, 20, 21)",
    )
    for spacing in ((0, 1, 1), (np.nan, 1, 1), (1, 1)):
        assert "voxel size" in judge(GOOD, mask(), spacing, SEEN, SETTINGS).reasons[0]


def test_all_reasons_are_given():
    agreement = Agreement({"liver": 0.1, "tumour": 0.1}, 0.1)
    verdict = judge(agreement, np.ones((20, 20, 20), np.uint8), SPACING, SEEN, SETTINGS)
    assert len(verdict.reasons) == 3


def test_select_takes_the_best_up_to_the_cap():
    means = {"a": 0.8, "b": 0.95, "c": 0.95, "d": 0.9, "e": 0.99}
    verdicts = {case: Verdict(case != "e") for case in means}
    agreements = {case: Agreement({}, mean) for case, mean in means.items()}
    assert select(verdicts, agreements, PromotionLimits(1.0)) == ["b", "c", "d", "a"]
    assert select(verdicts, agreements, PromotionLimits(0.4)) == ["b", "c"]
    assert select(verdicts, agreements, PromotionLimits(0.41)) == ["b", "c", "d"]
    assert select(verdicts, agreements, PromotionLimits(0.0)) == []
    backwards = {case: verdicts[case] for case in reversed(verdicts)}
    assert select(backwards, agreements, PromotionLimits(0.4)) == ["b", "c"]
    assert select({}, {}, PromotionLimits(0.5)) == []


def test_select_cap_is_exact():
    verdicts = {f"{n:02}": Verdict(True) for n in range(30)}
    assert len(select(verdicts, {case: Agreement({}, 1.0) for case in verdicts}, PromotionLimits(0.1))) == 3


def agreed(tumour, mean=0.9):
    return Agreement({"liver": mean, "tumour": tumour}, mean)


def test_scans_without_a_label_in_both_masks_come_last_and_are_few():
    agreements = {f"full{n}": agreed(0.8, 0.8) for n in range(8)} | {f"none{n}": agreed(None, 0.99) for n in range(8)}
    verdicts = {case: Verdict(True) for case in agreements}
    limits = PromotionLimits(1.0, empty=0.2)
    chosen = select(verdicts, agreements, limits)
    assert chosen[:8] == [f"full{n}" for n in range(8)]
    assert chosen[8:] == ["none0", "none1"]
    found = refusals(verdicts, agreements, limits, chosen)
    assert sorted(found) == [f"none{n}" for n in range(2, 8)]
    assert found["none2"] == ["both networks find no tumour; at most 20% of the promoted may (promote_empty)"]
    # the cap on all leaves none of them
    assert select(verdicts, agreements, PromotionLimits(0.5, empty=0.2)) == [f"full{n}" for n in range(8)]
    only = {case: verdicts[case] for case in verdicts if case.startswith("none")}
    assert select(only, agreements, limits) == []


def test_each_label_has_its_own_cap():
    agreements = {f"full{n}": Agreement({"a": 0.9, "b": 0.9}, 0.9) for n in range(8)}
    agreements |= {f"no_a{n}": Agreement({"a": None, "b": 0.9}, 0.9) for n in range(4)}
    agreements |= {f"no_b{n}": Agreement({"a": 0.9, "b": None}, 0.9) for n in range(4)}
    chosen = select({c: Verdict(True) for c in agreements}, agreements, PromotionLimits(1.0, empty=0.2))
    for name in ("a", "b"):
        assert 0 < sum(name in agreements[c].empty for c in chosen) <= 0.2 * len(chosen)


def test_promoted_scans_come_before_others_and_a_number_is_a_limit_too():
    agreements = {"a": agreed(0.9, 0.99), "b": agreed(0.9, 0.8), "c": agreed(0.9, 0.9)}
    verdicts = {case: Verdict(True) for case in agreements} | {"d": Verdict(False, ("mask: empty",))}
    limits = PromotionLimits(1.0, cases=2)
    assert select(verdicts, agreements, limits, before={"b"}) == ["b", "a"]
    found = refusals(verdicts, agreements, limits, ["b", "a"])
    assert found["d"] == ["mask: empty"]
    assert found["c"][0].startswith("passed, but 2 scans agree better (promote_fraction")
