"""What a label file holds: by name where it names its values, by value where only one reading is possible."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from aslseg.errors import BadLabelError
from aslseg.types import Labels, Volume
from aslseg.volume.io import read_label, write_label
from aslseg.volume.label_file import StoredLabel, label_on_scan

LABELS = Labels.parse("liver,tumour", "tumour:liver")
SHAPE = (9, 8, 6)
AFFINE = np.array([[-1.5, 0, 0, 40], [0, 1.5, 0, -20], [0, 0, 3, 7], [0, 0, 0, 1]])
SCAN = Volume(np.zeros(SHAPE, np.float32), AFFINE)
TRUTH = np.zeros(SHAPE, np.uint8)
TRUTH[2:7, 2:6, 1:5] = 1
TRUTH[3:5, 3:5, 2:4] = 2


def fields(*segments):
    """Header fields for (name, value, layer) each."""
    keys = ("Name", "LabelValue", "Layer")
    return {f"Segment{n}_{key}": str(v) for n, s in enumerate(segments) for key, v in zip(keys, s, strict=False)}


def decode(layers, named, affine=AFFINE, labels=LABELS, said=None):
    stored = StoredLabel(np.asarray(layers), affine, named)
    return label_on_scan("l.seg.nrrd", stored, SCAN, labels, [].append if said is None else said.append)


def valued(liver, tumour):
    return np.choose(TRUTH, (0, liver, tumour)).astype(np.uint8)[None]


@pytest.mark.parametrize(("liver", "tumour"), [(1, 2), (2, 1), (2, 3), (7, 200)])
def test_the_name_counts_not_the_value(liver, tumour):
    for order in itertools.permutations([("liver", liver, 0), ("tumour", tumour, 0)]):
        assert np.array_equal(decode(valued(liver, tumour), fields(*order)), TRUTH)


def test_layers_whose_inner_label_wins():
    layers = np.stack([TRUTH == 2, TRUTH > 0]).astype(np.uint8)
    assert np.array_equal(decode(layers, fields(("tumour", 1, 0), ("liver", 1, 1))), TRUTH)


def test_layers_as_older_slicers_write_them():
    layers = np.stack([TRUTH == 2, TRUTH > 0]).astype(np.uint8)
    assert np.array_equal(decode(layers, {"Segment0_Name": "tumour", "Segment1_Name": "liver"}), TRUTH)


def test_two_layers_of_two_values_each():
    labels = Labels.parse("a,b,c")
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0, :3], layers[0, 3:6], layers[1, 5:8] = 1, 2, 1
    found = decode(layers, fields(("a", 1, 0), ("b", 2, 0), ("c", 1, 1)), labels=labels)
    assert [int((found == v).sum()) for v in range(4)] == [48, 3 * 48, 2 * 48, 3 * 48]


@pytest.mark.parametrize("corner", [(2, 2, 1), (0, 1, 0), (-2, -1, -3)])
def test_a_segmentation_cropped_to_what_is_drawn(corner):
    """Or padded beyond the scan, where Slicer was given a larger geometry."""
    start = np.array(corner)
    box = np.zeros(np.array((7, 6, 5)) - np.minimum(start, 0) * 2, np.uint8)
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ start
    for index in np.argwhere(TRUTH):
        box[tuple(index - start)] = TRUTH[tuple(index)]
    assert np.array_equal(decode(box[None], fields(("liver", 1), ("tumour", 2)), affine), TRUTH)


def test_what_is_drawn_outside_the_scan_is_not_dropped():
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ [4, 0, 0]
    with pytest.raises(BadLabelError, match=r"\d+ drawn voxels lie outside its scan"):
        decode(TRUTH[None], fields(("liver", 1), ("tumour", 2)), affine)


def test_a_part_of_the_scan_needs_names_to_be_taken_for_a_crop():
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ [1, 1, 1]
    with pytest.raises(BadLabelError, match=r"shape \(7, 6, 4\), but its scan has \(9, 8, 6\)"):
        decode(TRUTH[1:8, 1:7, 1:5][None], {}, affine)


@pytest.mark.parametrize("shift", [0.3, 0.5])
def test_a_crop_between_the_voxels_of_the_scan(shift):
    affine = AFFINE.copy()
    affine[:3, 3] += AFFINE[:3, :3] @ [shift, 0, 0]
    with pytest.raises(BadLabelError, match="mm away from its scan"):
        decode(TRUTH[None], fields(("liver", 1), ("tumour", 2)), affine)


def test_another_voxel_size():
    with pytest.raises(BadLabelError, match="mm away from its scan"):
        decode(TRUTH[None], fields(("liver", 1), ("tumour", 2)), AFFINE @ np.diag([2, 2, 2, 1]))


@pytest.mark.parametrize("name", ["Liver", " LIVER ", "liver"])
def test_case_and_blanks_do_not_count(name):
    assert np.array_equal(decode(valued(1, 2), fields((name, 1), ("Tumour", 2))), TRUTH)


@pytest.mark.parametrize("name", ["Läsion", "La\u0308sion", "LÄSION", "la\u0308sion"])
def test_unicode_forms_do_not_count(name):
    labels = Labels.parse("liver,Läsion")
    assert np.array_equal(decode(valued(1, 2), fields(("liver", 1), (name, 2)), labels=labels), TRUTH)


@pytest.mark.parametrize(("name", "nearest"), [("Tumor", "tumour"), ("tumours", "tumour"), ("Livre", "liver")])
def test_a_close_name_is_asked_about(name, nearest):
    with pytest.raises(BadLabelError, match=rf"segment '{name}' is not one of .*did you mean '{nearest}'\?"):
        decode(
            valued(1, 2),
            fields((name, 1), ("liver", 2)) | {"Segment1_Name": "tumour" if nearest == "liver" else "liver"},
        )


def test_an_empty_segment_needs_no_known_name():
    assert np.array_equal(decode(valued(1, 2), fields(("liver", 1), ("tumour", 2), ("Segment_3", 3))), TRUTH)


def test_scribbles_are_no_labels():
    layers = np.stack([TRUTH, (TRUTH == 2).astype(np.uint8)])
    named = fields(("liver", 1, 0), ("tumour", 2, 0), ("foreground_scribbles", 1, 1))
    assert np.array_equal(decode(layers, named), TRUTH)


def test_voxels_of_no_segment():
    with pytest.raises(BadLabelError, match=r"values \[2\] belong to none of its segments \('liver'\)"):
        decode(valued(1, 2), fields(("liver", 1)))


def test_layers_that_nobody_names():
    with pytest.raises(BadLabelError, match="2 layers without names"):
        decode(np.stack([TRUTH, TRUTH]), {})


@pytest.mark.parametrize("key", ["LabelValue", "Layer"])
def test_a_segment_with_damaged_fields(key):
    with pytest.raises(BadLabelError, match="no number"):
        decode(valued(1, 2), fields(("liver", 1, 0)) | {f"Segment0_{key}": "many"})


def test_every_order_and_direction_of_axes_is_turned_back(tmp_path):
    truth = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        ornt = np.stack([np.argsort(axes), np.array(flips)], 1)
        turned = nib.orientations.apply_orientation(truth, ornt)
        affine = AFFINE @ nib.orientations.inv_ornt_aff(ornt, SHAPE)
        write_label(tmp_path / "l.nii.gz", turned, affine)
        assert np.array_equal(read_label(tmp_path / "l.nii.gz", SCAN, LABELS), truth)


def test_oblique_scans_too(tmp_path):
    angle = 0.4
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    scan = Volume(SCAN.array, turn @ AFFINE)
    flipped = scan.affine @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_label(tmp_path / "l.nii.gz", TRUTH[::-1], flipped)
    assert np.array_equal(read_label(tmp_path / "l.nii.gz", scan, LABELS), TRUTH)
    turn[0, 1] += 0.2
    write_label(tmp_path / "m.nii.gz", TRUTH, turn @ AFFINE)
    with pytest.raises(BadLabelError, match="mm away from its scan"):
        read_label(tmp_path / "m.nii.gz", scan, LABELS)


# --- values without names


@pytest.mark.parametrize(
    ("labels", "values", "wanted", "said"),
    [
        ("liver", (0, 255), (0, 1), "255 as 1 (liver)"),
        ("liver,tumour", (0, 0.99999, 1.99998), (0, 1, 2), "0.99999 as 1, 2 as 2 (liver, tumour)"),
        ("liver,tumour", (0, 0.99609375, 1.9921875), (0, 1, 2), "0.99609 as 1, 1.9922 as 2 (liver, tumour)"),
        ("liver", (0.004, 1), (0, 1), "0.004 as 0"),
        ("liver", (0, 254.99), (0, 1), "254.99 as 1"),
        ("liver,tumour", (0.0, 1.0, 2.0), (0, 1, 2), None),
    ],
)
def test_values_with_one_reading_are_mapped_and_said(labels, values, wanted, said):
    rng = np.random.default_rng(0)
    index = rng.integers(0, len(values), SHAPE)
    heard = []
    found = decode(np.array(values, np.float32)[index][None], {}, labels=Labels.parse(labels), said=heard)
    assert np.array_equal(found, np.array(wanted)[index])
    assert [said in sentence for sentence in heard] == ([True] if said else [])


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        ("liver,tumour", (0, 255), r"values \[255\] are not among 0\.\.2 .*0 = background, 1 = liver, 2 = tumour"),
        ("liver,tumour", (0, 127, 255), r"values \[127, 255\]"),
        ("liver", (0, 1, 255), r"values \[255\]"),
        ("liver", (0, 2), r"values \[2\]"),
        ("liver", (0, 0.3, 0.6, 1), r"2 values that are no whole numbers .*come from interpolation"),
        ("liver", (0, 1e9), "1 further values are not among"),
        ("liver", (0, np.nan), "NaN or infinite"),
    ],
)
def test_values_with_several_readings_are_refused_with_the_mapping_to_write(labels, values, message):
    index = np.random.default_rng(0).integers(0, len(values), SHAPE)
    with pytest.raises(BadLabelError, match=message):
        decode(np.array(values, np.float32)[index][None], {}, labels=Labels.parse(labels))


@pytest.mark.parametrize("slope", [0.99999, 0.99609375])
def test_a_header_that_scales_its_labels(tmp_path, slope):
    image = nib.Nifti1Image(TRUTH.astype(np.int16), AFFINE)
    nib.save(image, tmp_path / "l.nii")
    raw = bytearray((tmp_path / "l.nii").read_bytes())
    raw[112:116] = np.float32(slope).tobytes()
    (tmp_path / "l.nii").write_bytes(raw)
    assert np.array_equal(read_label(tmp_path / "l.nii", SCAN, LABELS), TRUTH)
