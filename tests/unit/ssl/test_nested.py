"""The second stage's view of a scan: which labels it has, its box, its relative intensities, and the way back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.settings import load_settings
from aslseg.ssl import nested
from aslseg.ssl.nested import Geometry
from aslseg.ssl.nested_batches import varied
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid

LABELS = Labels.parse("liver,spleen,tumour,necrosis", "tumour:liver,necrosis:tumour")
UNIT = Geometry((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 2.0, 0.25, 0.5)
SHAPE = (20, 18, 16)


def scan(level: float = 0.6, contrast: float = -0.1) -> tuple[np.ndarray, np.ndarray]:
    """A parent with a child of a few voxels in it; (i, j, k) image and class map of liver and tumour."""
    image = np.full(SHAPE, 0.1, np.float32)
    label = np.zeros(SHAPE, np.uint8)
    label[5:14, 4:12, 6:12] = 1
    label[8:10, 7:9, 8:10] = 2
    image[label == 1], image[label == 2] = level, level + contrast
    return image, label


def case(image: np.ndarray, label: np.ndarray | None) -> Prepared:
    return Prepared("a", "a", image, Grid.of(Volume(image, np.eye(4)), None), label)


def liver() -> nested.Branch:
    return nested.branches(Labels.parse("liver,tumour", "tumour:liver"))[0]


def test_everything_nested_in_a_top_level_label_is_one_branch():
    (branch,) = nested.branches(LABELS)
    assert (branch.parent, branch.values) == (0, (1, 3, 4))
    assert branch.labels == Labels(("liver", "tumour", "necrosis"), (None, 0, 1))
    assert branch.inner(np.arange(5)).tolist() == [0, 1, 0, 2, 3]
    assert nested.merged(np.arange(5), LABELS).tolist() == [0, 1, 2, 1, 1]
    assert nested.branches(Labels.parse("liver,spleen")) == []


def test_each_stage_has_the_settings_of_its_labels():
    settings = load_settings({"labels": "liver,spleen,tumour", "nested": "tumour:liver"}, env={})[0]
    first = nested.first_settings(settings)
    assert (first.labels, first.nested) == (("liver", "spleen"), ())
    (branch,) = nested.branches(settings.label_set)
    second = nested.settings_of(settings, branch.labels)
    assert second.label_set == Labels(("liver", "tumour"), (None, 0))
    assert second.seed == settings.seed


@pytest.mark.parametrize("level", [0.3, 0.6, 0.8])
def test_intensities_are_relative_to_the_parents_median(level):
    image, label = scan(level)
    view = nested.look(image, label > 0, UNIT)
    inside = label[view.where]
    assert np.allclose(view.image[inside == 1], 0.5)
    assert np.allclose(view.image[inside == 2], 0.5 - 0.1 / 0.5)
    assert view.image.min() == pytest.approx(max(0.0, 0.5 + (0.1 - level) / 0.5))


def test_the_box_has_the_margin_within_the_scan():
    _, label = scan()
    assert nested.box(label > 0, UNIT) == np.s_[3:16, 2:14, 4:14]
    label[0, 0, 0] = 1
    assert nested.box(label > 0, UNIT) == np.s_[0:16, 0:14, 0:14]


def test_without_a_parent_the_view_is_the_whole_scan_around_the_usual_median():
    image, label = scan(0.5)
    view = nested.look(image, np.zeros(SHAPE, bool), UNIT)
    assert view.image.shape == SHAPE
    assert np.allclose(view.image[label == 1], 0.5)


def test_a_finer_grid_gives_a_larger_view():
    image, label = scan()
    fine = replace(UNIT, spacing=(0.5, 1.0, 2.0))
    view = nested.look(image, label > 0, fine)
    box = [s.stop - s.start for s in view.where]
    assert view.image.shape == (2 * box[0], box[1], box[2] // 2)


def test_small_islands_of_a_predicted_parent_do_not_count():
    mask = np.zeros(SHAPE, bool)
    mask[2:8, 2:8, 2:8] = True
    mask[12:16, 12:16, 2:8] = True  # nearly half as large: a second kidney
    mask[18, 1, 14] = True
    kept = nested.largest(mask)
    assert kept.sum() == mask.sum() - 1
    assert not kept[18, 1, 14]


def test_labels_and_weights_of_a_case_lie_on_the_views_grid():
    image, label = scan()
    whole = replace(case(image, label), voxel_weight=np.full(SHAPE, 0.25, np.float16), weight=0.5)
    seen = nested.view_case(whole, label > 0, liver(), UNIT)
    assert seen.image.shape == seen.label.shape == seen.voxel_weight.shape == (13, 12, 10)
    assert seen.relative
    assert (seen.label == label[3:16, 2:14, 4:14]).all()
    assert seen.label.dtype == np.uint8
    assert (seen.voxel_weight == 0.25).all()
    assert seen.weight == 0.5
    assert seen.grid.spacing == UNIT.spacing


@pytest.mark.parametrize("spacing", [1.0, 1.02, 1.6])
def test_a_lesion_of_one_voxel_survives(spacing):
    image, label = scan()
    label[label == 2] = 1
    label[8, 8, 8] = 2
    geometry = replace(UNIT, spacing=(spacing,) * 3)
    assert (nested.view_case(case(image, label), label > 0, liver(), geometry).label == 2).sum() == 1


def test_the_box_of_a_parent_cut_by_the_scans_edge_begins_there():
    image, label = scan()
    label[:, :, :4] = 1
    view = nested.look(image, label > 0, UNIT)
    assert view.where[2].start == 0
    assert view.image.shape[2] == view.where[2].stop


def test_a_nested_label_without_its_parent_is_the_parent_of_its_scan():
    image, label = scan()
    label[label == 1] = 0
    seen = nested.view_case(case(image, label), np.isin(label, (1, 2)), liver(), UNIT)
    assert sorted(np.unique(seen.label)) == [0, 2]


@pytest.mark.parametrize(
    ("values", "unknown", "said"),
    [
        ((1, 3), (), False),
        ((3,), (), True),
        ((), (), False),
        # where nobody learns the tumours, the liver is "liver or anything in it", and vessels are still shown
        ((1, 3, 4), ("tumour",), False),
        ((1, 3, 5), ("necrosis",), False),
        ((3, 5), ("necrosis",), True),
    ],
)
def test_a_parent_of_which_only_the_outline_is_known_is_there(values, unknown, said):
    labels = Labels.parse("liver,spleen,tumour,vessel,necrosis", "tumour:liver,vessel:liver,necrosis:tumour")
    image, label = scan()
    label[:] = 0
    for n, value in enumerate(values):
        label[n + 1] = value
    found = case(image, labels.mark_unknown(label, unknown))
    reason = nested.without_parent(found, nested.branches(labels)[0], labels)
    assert (reason is not None and "without liver around it" in reason) == said


def test_the_grid_is_the_working_grid_coarsened_to_the_size_wanted():
    image, label = scan(0.7)
    cases = [case(image, label), case(image, None), case(image, np.zeros_like(label))]
    settings = load_settings({"nested_margin": "2", "nested_voxels": "1e6", "nested_range": "0.2"}, env={})[0]
    found = nested.geometry(cases, liver(), settings, (1.0, 1.0, 2.0))
    assert (found.spacing, found.working, found.half_range) == ((1.0, 1.0, 2.0), (1.0, 1.0, 2.0), 0.2)
    assert found.centre == pytest.approx(0.7)
    coarse = nested.geometry(cases, liver(), settings.model_copy(update={"nested_voxels": 400}), None)
    assert coarse.spacing[0] == coarse.spacing[2] > 1
    assert np.prod(coarse.shape((13, 12, 10))) < 500
    assert Geometry.of(found.stored()) == found


def test_the_first_stage_is_coarse_only_where_each_of_its_labels_is_drawn_again():
    image, label = scan()
    cases, small = [case(image, label)], {"nested_first_voxels": "1200"}
    livers = load_settings({"labels": "liver,tumour", "nested": "tumour:liver"} | small, env={})[0]
    scale = nested.first_scale(cases, livers, (1.0, 1.0, 2.0))
    assert scale.working == (1.0, 1.0, 2.0)
    assert scale.spacing[0] == scale.spacing[1] > 1
    assert np.prod(scale.shape(image.shape)) < 1400
    more = load_settings({"labels": "liver,spleen,tumour", "nested": "tumour:liver"} | small, env={})[0]
    assert nested.first_scale(cases, more, (1.0, 1.0, 2.0)) == nested.Scale((1.0, 1.0, 2.0), (1.0, 1.0, 2.0))


def test_a_scan_on_the_first_stages_grid_keeps_its_label_and_weights():
    image, label = scan()
    whole = replace(case(image, (label > 0).astype(np.uint8)), voxel_weight=np.full(image.shape, 0.5, np.float16))
    found = nested.scaled_case(whole, Labels(("liver",), (None,)), nested.Scale((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)))
    shape = tuple(round(n / 2) for n in image.shape)
    assert found.image.shape == found.label.shape == found.voxel_weight.shape == found.grid.shape == shape
    assert found.grid.spacing == (2.0, 2.0, 2.0)
    assert (found.label > 0).mean() == pytest.approx((label > 0).mean(), rel=0.2)
    assert np.allclose(found.voxel_weight, 0.5)


def test_both_stages_say_what_is_parent_and_the_first_shares_out_the_rest():
    (branch,) = nested.branches(Labels.parse("liver,spleen,tumour", "tumour:liver"))
    p = np.zeros((4, 1, 1, 4), np.float32)
    p[:3, 0, 0, 0] = 0.2, 0.5, 0.3
    p[:3, 0, 0, 1] = 0.0, 1.0, 0.0  # nothing but liver came into question
    p[:3, 0, 0, 2] = 0.5, 0.0, 0.5
    p[:3, 0, 0, 3] = 0.0, 1.0, 0.0
    inside = np.zeros((3, 1, 1, 4), np.float32)
    inside[:, 0, 0, 0] = 0.5, 0.4, 0.1
    inside[:, 0, 0, 1] = 0.6, 0.3, 0.1
    inside[:, 0, 0, 2] = 0.0, 0.2, 0.8
    inside[:, 0, 0, 3] = 1.0, 0.0, 0.0
    alone = p.copy()
    nested.put(p, inside, branch)
    assert np.allclose(p[:, 0, 0, 0], [0.2, 0.4, 0.3, 0.1], atol=1e-5)
    assert np.allclose(p[:, 0, 0, 1], [0.3, 0.525, 0.0, 0.175], atol=1e-5)
    assert np.allclose(p[:, 0, 0, 2], [0.25, 0.1, 0.25, 0.4], atol=1e-5)
    assert np.allclose(p[:, 0, 0, 3], [0.5, 0.5, 0.0, 0.0], atol=1e-5)
    nested.put(alone, inside, branch, found=False)
    assert np.allclose(alone[:, 0, 0, 1], [0.6, 0.3, 0.0, 0.1], atol=1e-5)
    assert np.allclose(alone[:, 0, 0, 2], [0.0, 0.2, 0.0, 0.8], atol=1e-5)


def test_changed_intensities_are_reproducible_and_stay_around_the_parents():
    image = torch.rand(40, 1, 8, 8, 8)
    one, two = (varied(image, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, varied(image, torch.Generator().manual_seed(4)))
    assert (one - image).abs().mean() > 0.01
    assert (varied(torch.full_like(image, 0.5), torch.Generator()) - 0.5).mean(dim=(1, 2, 3, 4)).abs().max() < 0.05
    steps = torch.zeros(400, 1, 8, 8, 8)
    steps[:, :, :4] = 0.4
    changed = varied(steps, torch.Generator().manual_seed(5))
    factor = (changed[:, :, :4].mean((1, 2, 3, 4)) - changed[:, :, 4:].mean((1, 2, 3, 4))) / 0.4
    assert 0.7 < factor.min() < 0.8
    assert 1.2 < factor.max() < 1.3


def test_islands_outside_of_the_box_become_background():
    (branch,) = nested.branches(Labels.parse("liver,spleen,tumour", "tumour:liver"))
    p = np.zeros((4, 3, 2, 2), np.float32)
    p[:3] = np.array([0.1, 0.6, 0.3], np.float32)[:, None, None, None]
    before = p.copy()
    nested.clear_outside(p, np.s_[1:3, 0:2, 0:1], branch)
    assert np.array_equal(p[:, 1:, :, :1], before[:, 1:, :, :1])
    assert np.allclose(p[:, 0], np.array([0.7, 0, 0.3, 0])[:, None, None])
    assert np.allclose(p[:, :, :, 1], np.array([0.7, 0, 0.3, 0])[:, None, None])
