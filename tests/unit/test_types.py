import numpy as np
import pytest

from aslseg.types import Labels, Volume, no_progress

NESTED = Labels.parse("liver,tumour,cyst", "tumour:liver,cyst:tumour")


def test_parse():
    labels = Labels.parse(" liver, tumour ,spleen", "tumour:liver")
    assert labels.names == ("liver", "tumour", "spleen")
    assert labels.parents == (None, 0, None)
    assert labels.values == {"liver": 1, "tumour": 2, "spleen": 3}
    assert len(labels) == 3


@pytest.mark.parametrize(
    ("names", "nested", "message"),
    [
        ("", "", "different names"),
        (" , ", "", "different names"),
        ("a,a", "", "different names"),
        ("liver,background", "", "meaning of its own"),
        ("Image", "", "meaning of its own"),
        ("liver,points", "", "'points' has a meaning of its own"),
        ("_hidden", "", "meaning of its own"),
        ("Liver,liver", "", "different names"),
        ("atrium", "tumour:liver", "unknown label 'tumour'"),
        ("liver,tumour", "tumor:liver", r"unknown label 'tumor'; did you mean 'tumour'\?"),
        ("a,b", "b:", "expected child:parent"),
        ("a,b,c", "c:a,c:b", "'c' has two parents"),
        ("a,b", "ab", "expected child:parent"),
        ("tumour,liver", "tumour:liver", "list 'liver' before 'tumour'"),
        ("a", "a:a", "before"),
    ],
)
def test_names_that_cannot_be(names, nested, message):
    with pytest.raises(ValueError, match=message):
        Labels.parse(names, nested)


def test_members_reach_down_the_whole_tree():
    assert NESTED.members(0) == [1, 2, 3]
    assert NESTED.members(1) == [2, 3]
    assert NESTED.members(2) == [3]


def test_regions_and_back():
    class_map = np.array([[0, 1], [2, 3]], np.uint8)
    regions = NESTED.regions(class_map)
    assert regions.dtype == bool
    assert regions.tolist() == [[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[0, 0], [0, 1]]]
    assert np.array_equal(NESTED.decode(regions), class_map)
    assert NESTED.decode(regions).dtype == np.uint8


def test_decode_takes_the_innermost_that_reaches_a_half():
    probabilities = np.array([[0.9, 0.9, 0.4, 0.49], [0.5, 0.49, 0.6, 0.2], [0, 0, 0, 0]])
    assert NESTED.decode(probabilities).tolist() == [2, 1, 2, 0]


def test_region_probabilities_are_best_inside_against_best_outside():
    softmax = np.array([0.1, 0.2, 0.3, 0.4])[:, None]
    found = NESTED.region_probabilities(softmax)
    assert found.dtype == np.float32
    assert found[:, 0] == pytest.approx([0.4 / 0.5, 0.4 / 0.6, 0.4 / 0.7])


@pytest.mark.parametrize("labels", [NESTED, Labels.parse("a,b,c"), Labels.parse("liver,tumour", "tumour:liver")])
def test_regions_of_a_softmax_decode_to_its_argmax(labels):
    softmax = np.random.default_rng(0).dirichlet(np.ones(len(labels) + 1), 500).T
    regions = labels.region_probabilities(softmax)
    assert np.array_equal(labels.decode(regions), softmax.argmax(0))
    for child, parent in enumerate(labels.parents):
        if parent is not None:
            assert (regions[parent] >= regions[child]).all()


def test_a_class_that_wins_with_less_than_half_is_kept():
    labels = Labels.parse("liver,tumour", "tumour:liver")
    softmax = np.array([0.2, 0.33, 0.47])[:, None]
    assert labels.decode(labels.region_probabilities(softmax)).tolist() == [2]


def test_spacing_of_an_oblique_volume():
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.8, -5])
    assert Volume(np.zeros((2, 2, 2)), affine).spacing == pytest.approx((0.7, 0.8, 5))


def test_silent_accepts_any_report():
    assert no_progress(1, 2, loss=0.3) is None


def test_labels_that_are_left_open():
    labels = Labels.parse("liver,tumour,vein,kidney", "tumour:liver,vein:liver")
    whole = np.array([0, 1, 2, 3, 4], np.uint8)
    assert labels.merge(whole, ("tumour",)).tolist() == [0, 1, 1, 3, 4]
    assert labels.merge(whole, ()).tolist() == whole.tolist()
    # 5 = 4 labels + 1 + liver's index; the vein is known
    assert labels.mark_unknown(whole, ("tumour",)).tolist() == [0, 5, 5, 3, 4]
    assert labels.mark_unknown(whole, ("tumour", "vein")).tolist() == [0, 5, 5, 5, 4]
    assert labels.mark_unknown(whole, ()).tolist() == whole.tolist()
    # a child of an unknown label lies in the outer one too
    deep = Labels.parse("a,b,c", "b:a,c:b")
    assert deep.mark_unknown(np.array([0, 1, 2, 3], np.uint8), ("b", "c")).tolist() == [0, 4, 4, 4]
    assert deep.mark_unknown(np.array([0, 1, 2, 3], np.uint8), ("c",)).tolist() == [0, 1, 5, 5]
