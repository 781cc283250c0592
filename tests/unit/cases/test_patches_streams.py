"""Where patches come from, draw by draw: a generator that says what it was asked, and answers from a list."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aslseg.cases.patches import PatchSampler
from aslseg.cases.prepared_case import Prepared
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

SHAPE = (20, 18, 12)
PATCH = (8, 8, 8)


class Told:
    """Answers ``random`` and ``integers`` from a list and keeps the ranges asked for."""

    def __init__(self, *answers: float) -> None:
        self.answers, self.ranges = list(answers), []

    def random(self) -> float:
        return self.answers.pop(0)

    def integers(self, low: int, high: int | None = None) -> int:
        first, end = (0, low) if high is None else (low, high)
        self.ranges.append((first, end))
        answer = int(self.answers.pop(0))
        assert first <= answer < end
        return answer


def case(label: dict[tuple[int, int, int], int] | None, shape: tuple[int, int, int] = SHAPE, name: str = "a"):
    image = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    classes = None
    if label is not None:
        classes = np.zeros(shape, np.uint8)
        for voxel, value in label.items():
            classes[voxel] = value
    return Prepared(name, name, image, Grid.of(Volume(image, np.eye(4)), None), classes)


def promoted(name: str, weight: float = 0.5) -> Prepared:
    voxel_weight = np.linspace(0, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    return replace(case({(0, 0, 0): 1}, name=name), weight=weight, voxel_weight=voxel_weight)


@pytest.mark.parametrize(
    ("voxel", "jitter", "start"),
    [
        ((9, 9, 6), (0, 0, 0), (5, 5, 2)),  # voxel - 8 / 2
        ((9, 9, 6), (2, -2, 1), (7, 3, 3)),
        ((3, 4, 5), (0, 0, 0), (0, 0, 1)),  # -1 on the first axis is moved inside
        ((19, 17, 11), (0, 0, 0), (12, 10, 4)),  # and so is 15, 13, 7
    ],
)
def test_a_foreground_patch_lies_around_its_voxel(voxel, jitter, start):
    one = case({voxel: 1})
    # below 0.5: foreground
    rng = Told(0, 0.49, 0, 0, *jitter)
    patch = PatchSampler([one], PATCH, 1).draw(rng)
    # one case, one class, one voxel, then a quarter of the patch either way
    assert rng.ranges == [(0, 1), (0, 1), (0, 1), (-2, 3), (-2, 3), (-2, 3)]
    assert rng.answers == []
    window = tuple(slice(s, s + 8) for s in start)
    assert np.array_equal(patch.image, one.image[window])
    assert np.array_equal(patch.label, one.label[window])
    assert patch.label.sum() == 1
    assert (patch.weight == 1).all()


def test_any_other_patch_lies_anywhere_the_last_place_included():
    one = case({(3, 4, 5): 1})
    rng = Told(0, 0.5, 12, 10, 4)
    patch = PatchSampler([one], PATCH, 1).draw(rng)
    assert rng.ranges == [(0, 1), (0, 13), (0, 11), (0, 5)]
    assert np.array_equal(patch.image, one.image[12:, 10:, 4:])


def test_every_class_is_as_likely_as_any_other_however_small():
    many = {(i, j, 0): 1 for i in range(10) for j in range(10)} | {(15, 15, 6): 3}
    rng = Told(0, 0.0, 1, 0, 0, 0, 0)
    patch = PatchSampler([case(many)], PATCH, 3).draw(rng)
    # two classes present (1 and 3); the second has one voxel
    assert rng.ranges[1:3] == [(0, 2), (0, 1)]
    assert (patch.label == 3).sum() == 1


def test_unlabelled_patches_ask_for_a_case_and_a_place_only():
    rng = Told(1, 5, 6, 2)
    two = [case(None), case(None, name="b")]
    patch = PatchSampler(two, PATCH, 1).draw(rng)
    assert rng.ranges == [(0, 2), (0, 13), (0, 11), (0, 5)]
    assert np.array_equal(patch.image, two[1].image[5:13, 6:14, 2:10])
    assert not patch.label.any()


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [(6, 1, 1), (5, 1, 2), (8, 0, 0)],
)
def test_padding_is_zero_and_counts_nothing(size, before, after):
    one = case(None, shape=(size, 18, 12))
    rng = Told(0, 0, 3, 2)
    patch = PatchSampler([one], PATCH, 1).draw(rng)
    inside = slice(before, 8 - after)
    assert np.array_equal(patch.image[inside], one.image[:, 3:11, 2:10])
    assert (patch.weight[inside] == 1).all()
    for outside in (slice(0, before), slice(8 - after, 8)):
        assert not patch.image[outside].any()
        assert not patch.weight[outside].any()


def test_human_and_promoted_cases_share_the_draws_evenly():
    cases = [case({(0, 0, 0): 1}, name="h1"), promoted("p1"), case({(0, 0, 0): 1}, name="h2"), promoted("p2")]
    cases.append(promoted("p3"))
    sampler = PatchSampler(cases, PATCH, 1)
    human, machine = Told(0.49, 1, 0.9, 0, 0, 0), Told(0.5, 2, 0.9, 2, 3, 1)
    assert (sampler.draw(human).weight == 1).all()
    assert human.ranges[0] == (0, 2)
    # the promoted case's weight times its voxels' weights, at the patch's place
    patch = sampler.draw(machine)
    assert machine.ranges[0] == (0, 3)
    assert np.allclose(patch.weight, 0.5 * cases[4].voxel_weight[2:10, 3:11, 1:9])


def test_with_promoted_cases_alone_no_share_is_drawn():
    rng = Told(0, 0.9, 0, 0, 0)
    PatchSampler([promoted("p1")], PATCH, 1).draw(rng)
    assert rng.answers == []


def test_shares_over_many_draws():
    # images told apart by their first voxel: two human cases, three promoted ones
    cases = []
    for n in range(5):
        one = case({(0, 0, 0): 1}, shape=(4, 4, 4), name=str(n))
        image = np.full((4, 4, 4), n, np.float32)
        cases.append(replace(one, image=image, voxel_weight=None if n < 2 else np.ones((4, 4, 4), np.float32)))
    sampler = PatchSampler(cases, (4, 4, 4), 1)
    rng = np.random.default_rng(0)
    counts = np.bincount([int(sampler.draw(rng).image[0, 0, 0]) for _ in range(2000)], minlength=5)
    # expected 500, 500, 333, 333, 333; four standard deviations are 78 and 67
    assert np.abs(counts[:2] - 500).max() < 78
    assert np.abs(counts[2:] - 2000 / 6).max() < 67


def test_a_patch_depends_on_seed_and_step_only():
    sampler = PatchSampler([case({(9, 9, 6): 1}), promoted("p1")], PATCH, 1)

    def drawn(seed: int, step: int) -> bytes:
        return sampler.draw(np.random.default_rng([seed, step])).image.tobytes()

    first = [drawn(1, step) for step in range(6)]
    assert [drawn(1, step) for step in reversed(range(6))] == first[::-1]
    assert len(set(first)) > 3
    assert [drawn(2, step) for step in range(6)] != first
