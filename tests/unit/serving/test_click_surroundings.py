"""What lies around an object that is clicked on: finished objects, its parent, and a size that is not plausible."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aslseg.errors import BadPromptError
from click_server import SHAPE, Served

LEFT, RIGHT = [12, 16, 10], [28, 16, 10]  # deep in the two halves of the block
BLOCK = np.s_[6:34, 6:26, 4:17]
EDGE = 20  # the first row of the right half


def block(folder: Path, case: str = "case") -> None:
    """A bright block on dark ground, which the SAM of these tests draws as one."""
    array = np.full(SHAPE, -160, np.float32)
    array[BLOCK] = 240
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{case}.nii")


def blocks(folder: Path) -> None:
    """Two bright blocks that do not touch."""
    array = np.full(SHAPE, -160, np.float32)
    array[BLOCK] = 240
    array[EDGE - 3 : EDGE + 3] = -160
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "case.nii")


def half(value: int, *, right: bool = False) -> np.ndarray:
    """A class map with one half of the block."""
    label = np.zeros(SHAPE, np.uint8)
    label[BLOCK] = value
    label[:EDGE] *= not right
    label[EDGE:] *= right
    return label


def store(folder: Path, tag: str, label: np.ndarray, case: str = "case") -> Path:
    path = folder / "labels" / tag / f"{case}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label, np.eye(4)), path)
    return path


@pytest.fixture
def organs(tmp_path: Path) -> Served:
    """Labels that do not lie in each other."""
    block(tmp_path)
    return Served(tmp_path, labels="liver,spleen", nested="", sam_zoom=0)


@pytest.mark.parametrize("tag", ["final", "aslseg_pseudo"])
@pytest.mark.parametrize("model", ["sam", "sam_2d"])
def test_a_finished_neighbour_is_not_painted_over(organs: Served, tmp_path: Path, tag: str, model: str) -> None:
    liver = half(1)
    store(tmp_path, tag, liver)
    asked = {"label": "spleen", "foreground": [RIGHT], "whole": True, "slice": 10}
    drawn, told = organs.ask("case", model, **asked)
    assert drawn[tuple(RIGHT)] == 1
    assert not (drawn & (liver > 0)).any()
    over, _ = organs.ask("case", model, **asked, respect_existing=False)
    assert (over & (liver > 0)).any(), "this SAM draws the whole block otherwise"
    assert told["source"] == "clicks"


def test_undo_brings_back_what_was_there(organs: Served, tmp_path: Path) -> None:
    store(tmp_path, "final", half(1))
    one = {"label": "spleen", "foreground": [RIGHT], "whole": True}
    before, _ = organs.ask("case", **one)
    two = {**one, "background": [[30, 20, 10]]}
    after, _ = organs.ask("case", **two)
    assert not np.array_equal(after, before)
    undone, _ = organs.ask("case", **two, undo=1)
    assert np.array_equal(undone, before)
    nothing, _ = organs.ask("case", **one, undo=1)
    assert not nothing.any()


def test_a_click_on_a_finished_neighbour_is_left_out_and_says_so(organs: Served, tmp_path: Path) -> None:
    store(tmp_path, "final", half(1))
    drawn, told = organs.ask("case", label="spleen", foreground=[LEFT, RIGHT], whole=True)
    assert drawn[tuple(RIGHT)] == 1
    assert drawn[tuple(LEFT)] == 0
    assert any("1 click(s) on a finished object" in note for note in told["notes"])
    alone, told = organs.ask("case", label="spleen", foreground=[LEFT], whole=True, client="other")
    assert not alone.any()
    assert any("untick respect_existing" in note for note in told["notes"])


def test_a_label_that_the_client_sends_counts_before_the_stored_one(organs: Served, tmp_path: Path) -> None:
    store(tmp_path, "final", half(1))
    sent = store(tmp_path, "sent", half(1)[:, :, ::-1] * 0)
    drawn, _ = organs.ask("case", label="spleen", foreground=[RIGHT], whole=True, label_file=sent)
    assert drawn[tuple(LEFT)] == 1, "the client has deleted the liver"
    sent = store(tmp_path, "sent", half(1))
    drawn, _ = organs.ask("case", label="spleen", foreground=[RIGHT], whole=True, label_file=sent, client="other")
    assert drawn[tuple(LEFT)] == 0


def test_an_automatic_mask_is_not_finished(organs: Served, tmp_path: Path) -> None:
    store(tmp_path, "original", half(1))
    drawn, _ = organs.ask("case", label="spleen", foreground=[RIGHT], whole=True)
    assert drawn[tuple(LEFT)] == 1


def test_a_second_object_of_the_same_label_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    blocks(tmp_path)
    served = Served(tmp_path, labels="liver,spleen", nested="", sam_zoom=0)
    first = half(2)
    first[EDGE - 3 : EDGE] = 0
    first[3:6, 6:26, 4:17] = 2  # what was submitted is not what SAM would draw
    store(tmp_path, "final", first)
    asked = {"label": "spleen", "foreground": [RIGHT], "whole": True}
    drawn, told = served.ask("case", **asked)
    assert drawn[tuple(RIGHT)] == 1
    assert np.array_equal(drawn[:EDGE], first[:EDGE] > 0)
    assert told["repaired"] is True
    undone, told = served.ask("case", **asked, undo=1)
    assert np.array_equal(undone, first > 0)
    assert told["source"] == "submitted mask"
    corrected, _ = served.ask("case", label="spleen", foreground=[LEFT], whole=True)
    assert corrected[4, 16, 10] == 0, "a click on it corrects it"


def test_a_nested_object_lies_in_its_parent_and_may_be_drawn_there(tmp_path: Path) -> None:
    block(tmp_path)
    served = Served(tmp_path, sam_zoom=0)
    liver = half(1)
    store(tmp_path, "final", liver)
    drawn, _ = served.ask("case", label="tumour", foreground=[LEFT], whole=True)
    assert drawn[tuple(LEFT)] == 1
    assert not (drawn & (liver == 0)).any()


@pytest.mark.parametrize("use_ssl", [True, False])
def test_an_automatic_parent_limits_where_automatic_masks_count(tmp_path: Path, use_ssl: bool) -> None:
    block(tmp_path)
    served = Served(tmp_path, sam_zoom=0)
    store(tmp_path, "original", half(1))
    drawn, _ = served.ask("case", label="tumour", foreground=[LEFT], whole=True, use_ssl=use_ssl)
    assert bool(drawn[EDGE:].any()) is not use_ssl


def test_a_click_outside_the_parent_is_believed(tmp_path: Path) -> None:
    block(tmp_path)
    served = Served(tmp_path, sam_zoom=0)
    store(tmp_path, "original", half(1))
    drawn, told = served.ask("case", label="tumour", foreground=[RIGHT], whole=True)
    assert drawn[tuple(RIGHT)] == 1
    assert any("outside the mask of liver" in note for note in told["notes"])


def test_a_finished_tumour_is_not_painted_over_by_its_liver(tmp_path: Path) -> None:
    block(tmp_path)
    served = Served(tmp_path, sam_zoom=0)
    store(tmp_path, "final", half(2))
    drawn, _ = served.ask("case", label="liver", foreground=[RIGHT], whole=True)
    assert drawn[tuple(RIGHT)] == 1
    assert not drawn[:EDGE].any()


def test_an_answer_of_implausible_size_asks_for_another_click(tmp_path: Path) -> None:
    block(tmp_path)
    served = Served(tmp_path, sam_zoom=0)
    _, told = served.ask("case", label="tumour", foreground=[LEFT])
    assert any("more than a tumour plausibly has; click once more, outside" in note for note in told["notes"])
    _, told = served.ask("case", label="liver", foreground=[LEFT])
    assert not any("plausibly" in note for note in told["notes"]), "a liver may be large"


def test_size_is_a_word(organs: Served) -> None:
    organs.ask("case", label="liver", size="automatic")
    with pytest.raises(BadPromptError, match="smaller, larger"):
        organs.ask("case", label="liver", size="huge")
