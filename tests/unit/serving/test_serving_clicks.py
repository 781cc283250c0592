"""The click models as a request reaches them: which file the clicks are on, and what goes on afterwards."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from aslseg.errors import BadLabelError
from aslseg.serving import clicks
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.params import MAX_POINTS
from aslseg.volume.geometry import Grid
from aslseg.volume.io import read_image
from click_server import MIDDLE, SHAPE, Served, ball


@pytest.fixture
def served(tmp_path: Path) -> Served:
    """Growing never comes to its end within a request."""
    return Served(tmp_path, first_click_seconds=0, click_seconds=0)


def test_clicks_on_an_upload_are_answered_within_the_request(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[object] = []
    monkeypatch.setattr(served.sessions.background, "add", lambda step, owner: ahead.append(owner))
    path = ball(tmp_path / "upload.nii")
    mask, told = served.ask(path, temporary=True)
    assert told["growing"] is False
    assert mask.any((0, 1)).sum() == 15
    served.ask(path, "sam_2d", temporary=True, slice=10)
    assert not ahead, "nothing is encoded ahead"
    served.ask(path, "sam_2d", foreground=[[20, 16, 10]])
    assert ahead, "as it is for a scan that stays"


@pytest.mark.parametrize("model", ["sam", "sam_2d"])
def test_slices_around_the_clicked_one_are_encoded_ahead(served: Served, tmp_path: Path, model: str) -> None:
    i, j, k = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    inside = (abs(i - 20) < 8) & (abs(j - 16) < 8) & (abs(k - 10) < 4)
    image = np.where(inside, 240, k - 160)  # no two slices alike
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), tmp_path / "case.nii")
    mask, _ = served.ask("case", model, slice=10)
    assert mask[..., 10].any()
    assert served.sessions.background.idle(60)
    (session,) = served.sessions._sessions.values()
    reach = served.models.settings.prefetch_slices
    assert reach == 8
    assert [n for n in range(SHAPE[2]) if session.predictor.is_embedded(n)] == list(range(2, 19))


def test_the_reply_says_where_the_object_ended_and_why(served: Served, tmp_path: Path) -> None:
    ball(tmp_path / "case.nii")
    _, told = served.ask("case", whole=True)
    reason = "the IoU that SAM predicts is too low"
    assert told["stopped"] == [{"axis": 2, "slice": k, "reason": reason} for k in (3, 17)]
    assert served.ask("case", client="else")[1]["stopped"] == [], "it grows on"


def test_a_client_cannot_say_that_a_scan_is_an_upload(served: Served, tmp_path: Path) -> None:
    ball(tmp_path / "kept.nii")
    assert served.ask("kept", once=True)[1]["growing"] is True, "an unknown parameter"


@pytest.mark.parametrize("model", ["sam", "sam_2d"])
def test_a_scan_that_is_deleted_while_its_object_grows(
    served: Served, tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = ball(tmp_path / "session.nii")
    with served.sessions.background.click(), caplog.at_level(logging.WARNING):
        _, told = served.ask(path, model)
        assert told.get("growing", True)
        path.unlink()
    before = served.sam.encoded
    assert served.sessions.background.idle(60)
    assert served.sam.encoded > before
    assert not caplog.records


def test_a_scan_that_is_overwritten_while_its_object_grows(served: Served, tmp_path: Path) -> None:
    path = ball(tmp_path / "case.nii")
    whole, _ = served.ask("case", whole=True, client="else")
    with served.sessions.background.click():
        served.ask("case")
        with path.open("r+b") as file:
            file.truncate(1000)
    assert served.sessions.background.idle(60), "the old scan's voxels are not those of the file"
    ball(path, shift=4)
    moved, _ = served.ask("case", whole=True)
    assert np.array_equal(moved[:, 4:], whole[:, :-4])


@pytest.mark.parametrize("model", ["sam", "sam_2d"])
def test_a_thousand_different_clicks_again_and_again(served: Served, tmp_path: Path, model: str) -> None:
    ball(tmp_path / "case.nii")
    voxels = [list(v) for v in np.ndindex(*SHAPE)][: 2 * MAX_POINTS]
    spent = []
    for count in (MAX_POINTS - 1, MAX_POINTS):
        begun = time.process_time()
        mask, _ = served.ask("case", model, foreground=voxels[:count], background=voxels[MAX_POINTS:], slice=10)
        spent.append(time.process_time() - begun)
        assert mask[0, 0, 10] == 1
    assert max(spent) < 5


def test_run_in_ohif_waits_for_the_object(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key that only OHIF sends."""
    monkeypatch.setattr(clicks, "RUN_SECONDS", 1e6)  # a busy machine takes longer than the usual 5 s
    ball(tmp_path / "scan.nii")
    mask, told = served.ask("scan", restore_label_idx=False)
    assert told["growing"] is False
    assert mask.any((0, 1)).sum() == 15


def test_the_same_clicks_inside_and_outside_are_refused(served: Served, tmp_path: Path) -> None:
    """What OHIF sends when Run is pressed while `background` is chosen."""
    ball(tmp_path / "scan.nii")
    with pytest.raises(RefusedError, match="choose the object's row"):
        served.ask("scan", background=[MIDDLE])


def test_vista3d_clicks_are_for_their_class_and_are_not_hidden_by_it(served: Served, tmp_path: Path) -> None:
    ball(tmp_path / "scan.nii")
    request = {"foreground": None, "points": [MIDDLE], "point_labels": [1], "label_prompt": [2], "whole": True}
    mask, told = served.ask("scan", **request)
    assert told["label_names"] == {"tumour": 1}
    assert mask[tuple(MIDDLE)] == 1


@pytest.mark.parametrize(("labels", "asked"), [("liver,tumour", []), ("atrium", [0])])
def test_without_clicks_and_label_nobody_guesses_which_of_several(
    labels: str, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid.of(read_image(ball(tmp_path / "scan.nii")), None)
    served, stages = Served(tmp_path, labels=labels, nested=""), []

    class Found:
        def __getitem__(self, index: int) -> np.ndarray:
            stages.append(index)
            return np.ones(SHAPE, np.float32)

    monkeypatch.setattr(served.models, "published", lambda kind: kind)
    monkeypatch.setattr(served.models, "hashes", dict)
    monkeypatch.setattr(served.tasks["sam"].scans, "open", lambda *_: SimpleNamespace(grid=grid))
    monkeypatch.setattr(served.tasks["sam"].scans, "stage", lambda *_: Found())
    mask, told = served.ask("scan", foreground=[])
    assert stages == asked
    assert told["source"] == ("automatic mask" if asked else "nothing clicked")
    assert mask.any() == bool(asked)


def test_a_segment_that_can_be_clicked_can_be_submitted(served: Served) -> None:
    """A click on another segment is refused at once, not the label after an hour of drawing."""
    ball(served.folder / "a.nii")
    with pytest.raises(BadLabelError, match="segment 'Segment_1' is not one of the labels liver, tumour"):
        served.ask("a", label="Segment_1")
    with pytest.raises(BadLabelError, match="did you mean 'tumour'"):
        served.ask("a", label="Tumor")


def test_capitals_do_not_count_and_come_back_as_they_were(served: Served) -> None:
    ball(served.folder / "a.nii")
    spelt, told = served.ask("a", label=" LIVER", whole=True)
    plain, _ = served.ask("a", label="liver", whole=True)
    assert np.array_equal(spelt, plain)
    assert told["label_names"] == {" LIVER": 1}, "the name of the client's own segment"
