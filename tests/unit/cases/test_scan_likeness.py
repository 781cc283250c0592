"""Scans that do not belong among abdominal CTs, beside those that do, on phantoms."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.cases import scan_likeness
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.scan_likeness import thumbnail, unlike_labelled
from aslseg.settings import Settings
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.intensity import normalise
from aslseg.volume.phantom import make_phantom

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from alien_scans import ALIENS, alien

PHANTOMS = [make_phantom(3, n, shape=(32, 32, 12)) for n in range(12)]


def prepared(name: str, volume: Volume) -> Prepared:
    grid = Grid.of(volume, None)
    return Prepared(name, name, grid.to_working(normalise(volume.array, Settings())), grid)


LABELLED = [prepared(f"l{n}", volume) for n, (volume, _) in enumerate(PHANTOMS[:5])]
TRUE = [prepared(f"u{n}", volume) for n, (volume, _) in enumerate(PHANTOMS[5:])]


@pytest.mark.parametrize("kind", ALIENS)
def test_an_alien_among_true_scans(kind: str) -> None:
    strange = prepared("alien", alien(kind, *PHANTOMS[6], 1))
    found = unlike_labelled(LABELLED, [*TRUE[:1], *TRUE[2:], strange])
    assert list(found) == ["alien"]
    assert "patients.csv (column intensities: confirmed)" in found["alien"]
    assert unlike_labelled(LABELLED, [*TRUE, strange], {"alien"}) == {}


def test_true_scans_are_passed_over_whatever_is_labelled() -> None:
    scans = [*LABELLED, *TRUE]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(scans))
        shuffled = [scans[n] for n in order]
        for labels in (2, 4, 8):
            assert unlike_labelled(shuffled[:labels], shuffled[labels:]) == {}


def test_what_is_exchanged_is_named() -> None:
    turned = [replace(c, id=f"t{n}", image=np.flip(c.image, n)) for n, c in enumerate(TRUE[:3])]
    found = unlike_labelled([*LABELLED, *TRUE[3:6]], [*TRUE[6:], *turned])
    assert set(found) == {"t0", "t1", "t2"}
    assert any("seems to have" in reason for reason in found.values())


def test_another_field_of_view() -> None:
    grid: Any = Grid.of(Volume(PHANTOMS[5][0].array, PHANTOMS[5][0].affine @ np.diag([3, 3, 3, 1])), None)
    found = unlike_labelled(LABELLED, [*TRUE[1:], replace(TRUE[0], grid=grid)])
    assert "field of view is 5" in found["u0"]


def test_a_rule_that_would_refuse_labelled_scans_is_not_used() -> None:
    """Where people have labelled both orientations, both are right."""
    both = [*LABELLED, *(replace(c, id=f"m{n}", image=c.image[::-1]) for n, c in enumerate(LABELLED[:3]))]
    assert unlike_labelled(both, [*TRUE, replace(TRUE[0], id="mirrored", patient="p", image=TRUE[0].image[::-1])]) == {}


def test_too_few_scans_to_compare() -> None:
    strange = prepared("alien", alien("noise", *PHANTOMS[6], 1))
    assert unlike_labelled(LABELLED[:1], [*TRUE, strange]) == {}
    assert unlike_labelled(LABELLED[:3], [*TRUE[:3], strange]) == {}
    assert unlike_labelled([], []) == {}


def test_scans_of_one_patient_say_nothing_of_each_other() -> None:
    copies = [replace(LABELLED[0], id=f"c{n}") for n in range(4)]
    assert unlike_labelled(copies, TRUE) == {}


def test_thumbnails_of_small_and_of_large_scans() -> None:
    assert thumbnail(np.ones((5, 9, 8), np.float32)).shape == (scan_likeness.SIDE,) * 3
    ramp = np.arange(64.0)[:, None, None] * np.ones((64, 16, 200))
    np.testing.assert_allclose(thumbnail(ramp)[:, 0, 0], np.arange(8) * 8 + 3, atol=0.6)
