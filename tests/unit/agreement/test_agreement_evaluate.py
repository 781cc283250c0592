import json

import numpy as np
import pytest

from aslseg.agreement.evaluate import evaluate_folders, to_markdown
from aslseg.errors import NotEnoughCasesError
from aslseg.types import Labels, Volume
from aslseg.volume.io import write_image, write_label

LABELS = Labels.parse("liver,tumour", "tumour:liver")
AFFINE = np.diag([2.0, 1.0, 1.0, 1.0])


def map_with(shift=0, tumour=True):
    array = np.zeros((12, 10, 10), np.uint8)
    array[2 + shift : 6 + shift, 2:6, 2:6] = 1
    if tumour:
        array[3 + shift, 3, 3] = 2
    return array


@pytest.fixture
def folders(tmp_path):
    pred, truth = tmp_path / "pred", tmp_path / "truth"
    for name, shift in (("a", 0), ("b", 1)):
        write_label(pred / f"{name}.nii.gz", map_with(shift), AFFINE)
        write_label(truth / f"{name}.nii.gz", map_with(0), AFFINE)
    return pred, truth


def test_scores_per_case_and_label(folders):
    result = evaluate_folders(*folders, LABELS)
    perfect = dict.fromkeys(("dice", "jaccard", "sensitivity", "specificity"), 1.0)
    perfect |= dict.fromkeys(("hd", "hd95", "hd95_max", "asd", "assd"), 0.0)
    lesions = {"true": 1, "found": 1, "predicted": 1, "false": 0}
    assert result["cases"]["a"]["liver"] == {**perfect, "flags": [], "lesions": lesions}
    tumour = result["cases"]["b"]["tumour"]
    assert (tumour["dice"], tumour["hd95"], tumour["asd"]) == (0.0, 2.0, 2.0)
    assert evaluate_folders(*folders, LABELS, unit="voxel")["cases"]["b"]["tumour"]["hd95"] == 1.0
    json.dumps(result, allow_nan=False)


def test_regions_hold_what_is_nested_in_them(folders):
    result = evaluate_folders(*folders, LABELS, regions=True)
    liver = result["cases"]["b"]["liver"]
    # a solid cube of 4 shifted by one voxel of 2 mm, as worked out in the test of the measures
    assert liver["dice"] == 0.75
    assert liver["asd"] == pytest.approx(36 / 56)
    assert evaluate_folders(*folders, LABELS)["cases"]["b"]["liver"]["dice"] < 0.75


def test_summary_is_mean_and_sample_deviation(folders):
    summary = evaluate_folders(*folders, LABELS, regions=True)["summary"]["liver"]["dice"]
    assert summary == {"mean": 0.875, "std": pytest.approx(0.125 * np.sqrt(2)), "n": 2}


def test_missing_extra_and_broken_are_listed_not_scored(folders):
    pred, truth = folders
    write_label(truth / "unpredicted.nii.gz", map_with(), AFFINE)
    write_label(pred / "unasked.nii.gz", map_with(), AFFINE)
    for folder in folders:
        write_label(folder / "broken.nii.gz", map_with(), AFFINE)
    (pred / "broken.nii.gz").write_bytes(b"no image")
    write_label(pred / "moved.nii.gz", map_with(), np.diag([2.0, 1.0, 1.5, 1.0]))
    write_label(truth / "moved.nii.gz", map_with(), AFFINE)
    write_label(pred / "cut.nii.gz", map_with()[1:], AFFINE)
    write_label(truth / "cut.nii.gz", map_with(), AFFINE)
    write_label(pred / "odd.nii.gz", map_with() * 5, AFFINE)
    write_label(truth / "odd.nii.gz", map_with(), AFFINE)
    result = evaluate_folders(pred, truth, LABELS)
    assert result["missing"] == ["unpredicted"]
    assert result["extra"] == ["unasked"]
    assert sorted(result["cases"]) == ["a", "b"]
    assert result["summary"]["liver"]["dice"]["n"] == 2
    assert set(result["problems"]) == {"broken", "moved", "cut", "odd"}
    assert "truncated or not an image" in result["problems"]["broken"]
    assert "mm away from its scan" in result["problems"]["moved"]
    assert "shape (11, 10, 10)" in result["problems"]["cut"]
    assert "values [5, 10] are not among 0..2" in result["problems"]["odd"]
    table = to_markdown(result)
    assert "missing predictions: unpredicted" in table
    assert "not scored: cut: label cut.nii.gz" in table


def test_other_extensions_match_by_name(folders, tmp_path):
    pred, truth = folders
    (pred / "a.nii.gz").unlink()
    write_image(pred / "a.nii", Volume(map_with().astype(np.float32), AFFINE))
    assert evaluate_folders(pred, truth, LABELS)["cases"]["a"]["liver"]["dice"] == 1


def test_empty_labels_do_not_spoil_the_summary(tmp_path):
    pred, truth = tmp_path / "pred", tmp_path / "truth"
    for folder in (pred, truth):
        write_label(folder / "a.nii.gz", map_with(tumour=False), AFFINE)
        write_label(folder / "b.nii.gz", np.zeros((5, 5, 5)), AFFINE)
    write_label(pred / "c.nii.gz", map_with(tumour=False), AFFINE)
    write_label(truth / "c.nii.gz", map_with(), AFFINE)
    result = evaluate_folders(pred, truth, LABELS)
    tumour = result["summary"]["tumour"]
    assert tumour["dice"] == {"mean": pytest.approx(2 / 3), "std": pytest.approx(np.sqrt(1 / 3)), "n": 3}
    assert tumour["hd95"] == {"mean": None, "std": None, "n": 0}
    assert (tumour["empty_in_both"], tumour["empty_prediction"], tumour["empty_truth"]) == (2, 1, 0)
    table = to_markdown(result)
    assert "| tumour | 3 | 0.667 ± 0.577 | 0.667 ± 0.577 |" in table
    assert "tumour: empty prediction 1×, empty in both 2×" in table


def test_table_names_the_unit(folders):
    assert "HD95 (mm)" in to_markdown(evaluate_folders(*folders, LABELS))
    assert "HD95 (voxels)" in to_markdown(evaluate_folders(*folders, LABELS, unit="voxel"))
    assert to_markdown(evaluate_folders(*folders, LABELS, regions=True)).startswith("| region |")


def test_nothing_to_score(folders, tmp_path):
    with pytest.raises(NotEnoughCasesError, match="no such folder"):
        evaluate_folders(tmp_path / "absent", folders[1], LABELS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotEnoughCasesError, match="carries the name of its truth"):
        evaluate_folders(tmp_path / "empty", folders[1], LABELS)


def test_progress_is_reported(folders):
    seen = []
    evaluate_folders(*folders, LABELS, report=lambda done, total, **_: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_masks_in_another_order_of_axes_and_named_segments(tmp_path):
    truth = map_with()
    write_label(tmp_path / "truth" / "a.nii.gz", truth, AFFINE)
    turned = AFFINE @ np.array([[0, 0, -1, truth.shape[0] - 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    write_label(tmp_path / "pred" / "a.nii.gz", truth.transpose(1, 2, 0)[:, :, ::-1], turned)
    result = evaluate_folders(tmp_path / "pred", tmp_path / "truth", LABELS)
    assert result["summary"]["tumour"]["dice"]["mean"] == 1.0


def test_lesions_are_summed_over_the_scans(tmp_path):
    def scan(*voxels):
        mask = np.zeros((9, 9, 9), np.uint8)
        for voxel in voxels:
            mask[voxel] = 2
        return mask

    pairs = {
        "a": (scan((1, 1, 1), (7, 7, 7)), scan((1, 1, 1), (4, 4, 4))),
        "b": (scan((1, 1, 1)), scan()),
    }
    for case, (pred, truth) in pairs.items():
        write_label(tmp_path / "pred" / f"{case}.nii.gz", pred, AFFINE)
        write_label(tmp_path / "truth" / f"{case}.nii.gz", truth, AFFINE)
    result = evaluate_folders(tmp_path / "pred", tmp_path / "truth", LABELS)
    found = result["summary"]["tumour"]["lesions"]
    assert {k: found[k] for k in ("true", "found", "predicted", "false")} == {
        "true": 2,
        "found": 1,
        "predicted": 3,
        "false": 2,
    }
    assert (found["recall"], found["false_per_scan"]) == (0.5, 1.0)
    assert found["f1"] == pytest.approx(2 * 0.5 / 3 / (0.5 + 1 / 3))
    table = to_markdown(result)
    assert "| tumour | 2 | 1 | 0.500 | 3 | 0.400 | 1.000 |" in table
    assert "26-neighbourhood" in table
    assert result["cases"]["b"]["tumour"]["sensitivity"] is None
    assert result["cases"]["b"]["tumour"]["specificity"] == pytest.approx(728 / 729)
