"""Intensities relative to a parent."""

from __future__ import annotations

import numpy as np
import pytest

from aslseg.cases import relative
from aslseg.settings import Settings
from aslseg.types import Labels

LABELS = Labels.parse("liver,spleen,tumour,necrosis", "tumour:liver,necrosis:tumour")


def test_the_median_is_half_and_the_range_is_cut_off():
    found = relative.relative(np.array([0.1, 0.35, 0.6, 0.7, 0.9]), 0.6, 0.25)
    assert found == pytest.approx([0, 0, 0.5, 0.7, 1])


def test_the_outermost_parent_of_each_label():
    assert relative.outermost(LABELS) == [None, None, 0, 0]
    assert relative.parents(LABELS) == [0]
    assert relative.parents(Labels.parse("liver,spleen")) == []


def test_medians_of_parents_that_are_found_and_one_view_of_each_parent():
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(4, 4, 4)
    regions = LABELS.regions((image > 0.5).astype(np.uint8))
    found = relative.centres(image, list(regions), LABELS)
    assert found == {0: pytest.approx(0.75, abs=0.01)}
    assert relative.centres(image, list(np.zeros_like(regions)), LABELS) == {}
    alone = LABELS.regions(np.where(image > 0.5, 3, 0).astype(np.uint8))
    assert relative.centres(image, list(alone), LABELS) == {}
    shown = relative.views(image, found, LABELS, 0.25)
    assert np.array_equal(shown[0], image)
    assert np.array_equal(shown[1], relative.relative(image, found[0], 0.25).astype(np.float32))
    assert np.array_equal(relative.views(image, {}, LABELS, 0.25)[1], image)
    assert relative.views(image, found, LABELS, None).shape == (1, 4, 4, 4)


def test_only_nested_labels_with_a_second_stage_have_a_range():
    assert relative.half_range(Settings()) == Settings().nested_range
    assert relative.half_range(Settings(nested_fraction=0)) is None
    assert relative.half_range(Settings(labels=("liver",), nested=())) is None
