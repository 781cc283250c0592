"""The verdict answers on any mask, and a stricter threshold never promotes more."""

import numpy as np
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aslseg.agreement.measures import Agreement, compare
from aslseg.agreement.plausibility import Reference
from aslseg.agreement.promotion_rules import PromotionLimits, Verdict, judge, select
from aslseg.settings import Settings
from aslseg.types import Labels

LABELS = Labels.parse("liver,tumour", "tumour:liver")
SEEN = Reference({"liver": (5.0, 100.0), "tumour": (1.0, 50.0)}, {"liver": 1, "tumour": 3})
parts = st.floats(0, 1)
maps = hnp.arrays(np.uint8, (4, 4, 3), elements=st.integers(0, 2))


def settings(liver: float, tumour: float) -> Settings:
    return Settings(promote_threshold=f"{liver:.6f},tumour={tumour:.6f}")


@examples(deadline=None)
@given(maps, maps, parts, parts, parts, parts)
def test_raising_a_threshold_never_promotes(a, b, liver, tumour, more_liver, more_tumour):
    agreement = compare(a, b, LABELS)
    loose = judge(agreement, b, (1.0, 1.0, 1.0), SEEN, settings(liver, tumour))
    strict = judge(agreement, b, (1.0, 1.0, 1.0), SEEN, settings(max(liver, more_liver), max(tumour, more_tumour)))
    assert loose.promote or not strict.promote
    assert set(loose.reasons) == set() or strict.reasons


@examples(deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int64, np.float32, np.float64, bool]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    st.one_of(st.none(), st.floats()),
    st.one_of(st.none(), st.floats()),
    st.tuples(st.floats(), st.floats(), st.floats()),
)
def test_any_mask_gets_a_verdict(odd, liver, tumour, spacing):
    verdict = judge(Agreement({"liver": liver, "tumour": tumour}, 1.0), odd, spacing, SEEN, settings(0.9, 0.7))
    assert verdict.promote == (not verdict.reasons)


@examples(deadline=None)
@given(maps, maps)
def test_agreement_is_symmetric_and_bounded(a, b):
    forth, back = compare(a, b, LABELS), compare(b, a, LABELS)
    assert forth.per_label == back.per_label
    assert forth.mean == back.mean
    assert 0 <= forth.mean <= 1
    assert compare(a, a, LABELS).mean == 1


@examples(deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.booleans(), parts)), parts, st.randoms())
def test_selection_does_not_depend_on_the_order_of_cases(cases, fraction, shuffler):
    agreements = {case: Agreement({}, mean) for case, (_, mean) in cases.items()}
    names = list(cases)
    shuffler.shuffle(names)
    chosen = select({c: Verdict(cases[c][0]) for c in cases}, agreements, PromotionLimits(fraction))
    assert chosen == select({c: Verdict(cases[c][0]) for c in names}, agreements, PromotionLimits(fraction))
    assert all(cases[c][0] for c in chosen)
    assert len(chosen) < fraction * len(cases) + 1
