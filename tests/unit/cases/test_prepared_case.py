"""Cases in memory within a budget: what is copied, what stays mapped, and that nothing else changes."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aslseg.cases.patches import PatchSampler
from aslseg.cases.prepared_case import Prepared, backing_file, load_within_budget
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

SHAPE = (20, 18, 10)
IMAGE, LABEL = 4 * 20 * 18 * 10, 20 * 18 * 10


def on_disk(folder: Path, name: str, shape: tuple[int, int, int] = SHAPE) -> Prepared:
    rng = np.random.default_rng(int(name))
    image, label = rng.random(shape, np.float32), (rng.random(shape) < 0.1).astype(np.uint8)
    for part, array in (("image", image), ("label", label)):
        np.save(folder / f"{name}.{part}.npy", array)
    mapped = [np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("image", "label")]
    return Prepared(name, name, mapped[0], Grid.of(Volume(image, np.eye(4)), None), mapped[1])


def mapped(case: Prepared) -> bool:
    return isinstance(case.image, np.memmap) and isinstance(case.label, np.memmap)


def test_the_budget_is_kept_first_cases_first(tmp_path, caplog):
    cases = [on_disk(tmp_path, str(n)) for n in range(3)]
    with caplog.at_level(logging.INFO):
        found = load_within_budget(cases, 2 * (IMAGE + LABEL))
    assert [mapped(c) for c in found] == [False, False, True]
    assert "2 of 3 cases in memory, 0.00 of 0.00 GB used; left where they are: 2" in caplog.text
    assert [mapped(c) for c in load_within_budget(cases, 2 * (IMAGE + LABEL) - 1)] == [False, True, True]
    assert all(mapped(c) for c in load_within_budget(cases, 0))
    for before, after in zip(cases, found, strict=True):
        assert after.image.dtype == np.float32
        assert np.array_equal(before.image, after.image)
        assert np.array_equal(before.label, after.label)


def test_a_small_case_behind_a_large_one_still_fits(tmp_path):
    cases = [on_disk(tmp_path, "0", (40, 40, 40)), on_disk(tmp_path, "1")]
    assert [mapped(c) for c in load_within_budget(cases, IMAGE + LABEL)] == [True, False]


def test_what_lies_in_memory_already_counts(tmp_path):
    promoted = replace(on_disk(tmp_path, "0"), label=np.zeros(SHAPE, np.uint8))
    cases = [on_disk(tmp_path, "1"), promoted]
    assert mapped(load_within_budget(cases, IMAGE + LABEL)[0])
    assert not mapped(load_within_budget(cases, IMAGE + 2 * LABEL)[0])


def test_only_a_whole_mapped_file_is_known_by_its_name(tmp_path):
    image = on_disk(tmp_path, "0").image
    assert backing_file(image) == tmp_path / "0.image.npy"
    assert backing_file(image[1:]) is None
    assert backing_file(np.array(image)) is None


@pytest.mark.parametrize("shape", [SHAPE, (6, 18, 5)])
def test_patches_are_the_same_from_disk_memory_and_device(tmp_path, shape):
    cases = [on_disk(tmp_path, str(n), shape) for n in range(2)]
    weight = np.random.default_rng(9).random(shape).astype(np.float16)
    cases.append(replace(on_disk(tmp_path, "2", shape), weight=0.5, voxel_weight=weight))
    cases.append(replace(on_disk(tmp_path, "3", shape), label=None))
    on_device = load_within_budget(cases, 1e9, torch.device("cpu"))
    assert isinstance(on_device[0].image, torch.Tensor)
    assert on_device[2].voxel_weight.dtype == torch.float16
    drawn = []
    for some in (
        cases,
        load_within_budget(cases, 1e9),
        on_device,
        load_within_budget(cases, 2 * (IMAGE + LABEL), torch.device("cpu")),
    ):
        sampler, rng = PatchSampler(some, (8, 8, 8), 1), np.random.default_rng(5)
        drawn.append([sampler.draw(rng) for _ in range(30)])
    for others in drawn[1:]:
        for one, other in zip(drawn[0], others, strict=True):
            for part in ("image", "label", "weight"):
                assert np.array_equal(getattr(one, part), np.asarray(getattr(other, part)))
                assert getattr(one, part).dtype == np.asarray(getattr(other, part)).dtype
