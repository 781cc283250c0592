"""Synthetic lesions: where they lie, what they look like, and that a generator repeats them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from aslseg.cases.patches import Patch
from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings
from aslseg.ssl import synthetic_lesions
from aslseg.ssl.synthetic_lesions import COPY, MOST_COPIES, RADIUS_MM, Appearance, Lesions, with_synthetic
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid

LABELS = Labels.parse("liver,tumour", "tumour:liver")
SHAPE = (40, 36, 30)


def view(lesions: int = 1, contrast: float = -0.2, spacing: float = 2.0) -> Prepared:
    """A labelled view: a parent with cubic lesions of 27 voxels."""
    rng = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    label[4:36, 4:32, 4:26] = 1
    for n in range(lesions):
        label[8 + 6 * n : 11 + 6 * n, 10:13, 10:13] = 2
    image = (0.1 + 0.4 * (label > 0) + contrast * (label == 2) + rng.normal(0, 0.02, SHAPE)).astype(np.float32)
    return Prepared("a", "a", image, Grid.of(Volume(image, np.diag([spacing] * 3 + [1])), None), label)


def patch_of(case: Prepared) -> Patch:
    return Patch(case.image, case.label, np.ones(SHAPE, np.float32))


def test_labelled_lesions_are_measured_one_by_one():
    found = Appearance.of([view(3, -0.2), view(1, 0.1)], 2, [1])
    assert np.allclose(sorted(found.contrasts), [-0.2, -0.2, -0.2, 0.1], atol=0.02)
    assert np.allclose(found.radii, (3 * 27 * 8 / (4 * np.pi)) ** (1 / 3))
    assert found.deviation == pytest.approx(0.02, rel=0.1)


def test_many_labelled_lesions_decide_and_none_leave_it_wide():
    rng = np.random.default_rng(0)
    many = Appearance((-0.2,) * 80, (6.0,) * 80, 0.05)
    none = Appearance((), (), 0.05)
    contrasts, radii = np.array([many.draw(rng) for _ in range(500)]).T
    assert np.median(contrasts) == pytest.approx(-0.2, abs=0.02)
    assert np.median(radii) == pytest.approx(6, abs=0.5)
    contrasts, radii = np.array([none.draw(rng) for _ in range(500)]).T
    assert 0.1 < (contrasts > 0).mean() < 0.4
    assert np.abs(contrasts).min() >= 0.7 * 0.05
    assert RADIUS_MM[0] <= radii.min() < 4 < 15 < radii.max() <= RADIUS_MM[1]


def test_lesions_lie_in_the_parent_and_nothing_changes_far_from_them():
    case = view(0)
    before = case.image.copy(), case.label.copy()
    drawn = Lesions([view()], LABELS, 1.0).into(patch_of(case), np.random.default_rng(3))
    new = drawn.label == 2
    assert new.sum() > 20
    assert (case.label[new] == 1).all()
    assert (drawn.label[~new] == case.label[~new]).all()
    outside = case.label == 0
    far = outside & (np.abs(drawn.image - case.image) > 0.02)
    assert far.mean() < 0.01
    assert drawn.image.min() >= 0
    assert drawn.image.max() <= 1
    # what the sampler holds is not painted over
    assert (case.image == before[0]).all()
    assert (case.label == before[1]).all()


def test_they_look_like_the_labelled_ones():
    lesions = Lesions([view(4, -0.2)] * 20, LABELS, 1.0)
    rng, differences = np.random.default_rng(5), []
    for _ in range(20):
        case = view(0)
        drawn = lesions.into(patch_of(case), rng)
        if (drawn.label == 2).any():
            differences.append(np.median(drawn.image[drawn.label == 2]) - 0.5)
    assert np.median(differences) == pytest.approx(-0.2, abs=0.06)


def test_a_generator_repeats_them_on_arrays_and_on_tensors():
    lesions, case = Lesions([view()], LABELS, 1.0), view(0)
    one, two = (lesions.into(patch_of(case), np.random.default_rng(7)) for _ in range(2))
    assert (one.image == two.image).all()
    assert (one.label == two.label).all()
    tensors = Patch(torch.from_numpy(case.image), torch.from_numpy(case.label), one.weight)
    three = lesions.into(tensors, np.random.default_rng(7))
    assert torch.equal(three.image, torch.from_numpy(one.image))
    assert torch.equal(three.label, torch.from_numpy(one.label))
    other = lesions.into(patch_of(case), np.random.default_rng(8))
    assert (other.label != one.label).any()


def test_a_patch_without_parent_stays_as_it_is_and_so_does_every_patch_at_chance_0():
    case = view(0)
    empty = Patch(case.image, np.zeros_like(case.label), None)
    assert (Lesions([view()], LABELS, 1.0).into(empty, np.random.default_rng(0)).image == case.image).all()
    patch = patch_of(case)
    assert Lesions([view()], LABELS, 0.0).into(patch, np.random.default_rng(0)) is patch


def test_a_label_in_a_nested_label_gets_lesions_in_that_one():
    labels = Labels.parse("liver,tumour,necrosis", "tumour:liver,necrosis:tumour")
    lesions = Lesions([view()], labels, 1.0)
    assert lesions.hosts == {2: 1, 3: 2}
    case = view(0)
    case.label[12:28, 10:26, 8:22] = 2
    rng, seen = np.random.default_rng(0), np.zeros(SHAPE, bool)
    for _ in range(10):
        drawn = lesions.into(patch_of(case), rng)
        seen |= drawn.label == 3
    assert seen.any()


def test_what_lies_in_a_nested_label_differs_from_that_one_as_labelled_and_not_from_the_outermost():
    """A dark tumour (0.2 below its liver) with a core that is darker still by 0.1."""
    labels = Labels.parse("liver,tumour,necrosis", "tumour:liver,necrosis:tumour")

    def scan(cores: int) -> Prepared:
        case = view(0)
        case.label[8:32, 8:28, 6:24] = 2
        for n in range(cores):
            case.label[12 + 6 * n : 15 + 6 * n, 14:17, 12:15] = 3
        case.image[case.label > 1] -= 0.2
        case.image[case.label == 3] -= 0.1
        return case

    lesions = Lesions([scan(3)] * 20, labels, 1.0)
    # tumours lie in the view's own parent, whatever its median without them
    assert lesions.appearance[2].level == 0.5
    assert lesions.appearance[3].level == pytest.approx(0.3, abs=0.01)
    lesions.hosts = {3: 2}
    rng, differences = np.random.default_rng(5), []
    for _ in range(20):
        drawn = lesions.into(patch_of(scan(0)), rng)
        if (drawn.label == 3).any():
            differences.append(np.median(drawn.image[drawn.label == 3]) - 0.3)
    assert np.median(differences) == pytest.approx(-0.1, abs=0.03)


def test_lesions_of_one_voxel_and_cases_without_parent_are_no_obstacle():
    case = view(0)
    case.label[20, 20, 20] = 2
    bare = view(0)
    bare.label[:] = 0
    found = Appearance.of([case, bare], 2, [1])
    assert len(found.contrasts) == 1
    drawn = Lesions([bare, case], LABELS, 1.0).into(patch_of(case), np.random.default_rng(1))
    assert (drawn.label == 2).sum() > 1


def named(name: str, case: Prepared) -> Prepared:
    return replace(case, id=name)


def test_whole_scans_get_a_copy_with_lesions_in_their_parent():
    cases = [replace(named(name, view(n)), image_hash="x", label_hash="y") for name, n in (("a", 1), ("b", 0))]
    cases.append(named("none", replace(view(0), label=np.zeros(SHAPE, np.uint8))))
    before = [(c.image.copy(), c.label.copy()) for c in cases]
    found = with_synthetic(cases, Settings())
    assert [c.id for c in found] == ["a", "b", "none", f"a{COPY}", f"b{COPY}"]
    assert not any(c.image_hash or c.label_hash for c in found[3:])
    assert all(
        np.array_equal(c.image, i) and np.array_equal(c.label, m) for c, (i, m) in zip(cases, before, strict=True)
    )
    for case, copy in zip(cases, found[3:], strict=False):
        new = copy.label != case.label
        assert new.sum() > 20
        assert (copy.label[new] == 2).all()
        assert (case.label[new] == 1).all()
        assert np.array_equal(copy.image[case.label == 0], case.image[case.label == 0])
        assert np.abs(copy.image - case.image)[new].mean() > 0.01
        assert copy.image.dtype == np.float32
        assert 0 <= copy.image.min() <= copy.image.max() <= 1
    again = with_synthetic(cases, Settings())
    assert all(np.array_equal(a.image, b.image) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("changed", [{"nested_synthetic": 0.0}, {"nested_fraction": 0.0}, {"nested": ()}])
def test_without_nested_labels_or_where_they_are_off_there_is_no_copy(changed: dict[str, object]):
    cases = [view()]
    assert with_synthetic(cases, Settings(**changed)) == cases  # type: ignore[arg-type]


def test_copies_are_limited_and_no_more_are_painted(monkeypatch: pytest.MonkeyPatch):
    cases = [named(f"{n:02d}", view()) for n in range(MOST_COPIES + 3)]
    painted, held, most = [], [], []
    into, relative = Lesions.into, synthetic_lesions._relative

    def seen(*given: Any) -> Prepared:
        held.append(weakref.ref(made := relative(*given)))
        most.append(sum(ref() is not None for ref in held))
        return made

    monkeypatch.setattr(synthetic_lesions, "_relative", seen)
    monkeypatch.setattr(Lesions, "into", lambda self, *given: painted.append(1) or into(self, *given))
    assert len(with_synthetic(cases, Settings())) == len(cases) + MOST_COPIES
    assert len(painted) == MOST_COPIES
    # one relative scan at a time, and the one before it while the next is made
    assert max(most) <= 2


def test_lesions_are_drawn_into_every_parent():
    settings = Settings(labels="liver,tumour,kidney,cyst", nested="tumour:liver,cyst:kidney")  # type: ignore[arg-type]
    both, kidney = named("both", view(0)), named("kidney", view(0))
    both.label[:, 18:][both.label[:, 18:] == 1] = 3
    kidney.label[kidney.label == 1] = 3
    found = with_synthetic([both, kidney], settings)
    assert [c.id for c in found[2:]] == [f"both{COPY}", f"kidney{COPY}"]
    assert set(np.unique(found[2].label)) == {0, 1, 2, 3, 4}
    assert set(np.unique(found[3].label)) == {0, 3, 4}
    for case, copy in zip((both, kidney), found[2:], strict=True):
        assert (case.label[copy.label == 4] == 3).all()
        assert (case.label[copy.label == 2] == 1).all()


def test_lesions_have_the_voxel_size_of_their_scan(monkeypatch: pytest.MonkeyPatch):
    """Scans may keep their own."""
    drawn: list[tuple[float, float, float]] = []
    into = Lesions.into
    monkeypatch.setattr(Lesions, "into", lambda self, *given: drawn.append(self.spacing) or into(self, *given))
    with_synthetic([named("a", view(spacing=1.0)), named("b", view(spacing=4.0))], Settings())
    assert drawn == [(1.0,) * 3, (4.0,) * 3]


def test_copies_of_odd_scans():
    """A lesion of one voxel, a lesion without its parent, and a parent that the scan's edge cuts."""
    speck, alone, cut = (named(name, view(0)) for name in ("speck", "alone", "cut"))
    speck.label[20, 20, 15] = 2
    alone.label[:] = 0
    alone.label[10:14, 10:14, 10:14] = 2
    cut.label[:, :, :] = 0
    cut.label[:10, :10, :10] = 1
    found = with_synthetic([speck, alone, cut], Settings())
    assert [c.id for c in found[3:]] == [f"cut{COPY}", f"speck{COPY}"]
    assert all(np.isfinite(c.image).all() and (c.label == 2).any() for c in found[3:])
    assert (found[3].label[cut.label == 0] == 0).all()
