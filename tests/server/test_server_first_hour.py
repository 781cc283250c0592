"""The first hour of an annotator at 3D Slicer, with the client of Slicer's own module, on a server that just started.

It runs first on the shared server: the round that starts by itself is stopped and taken up again here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

from slicer_module import SlicerModule


def status(server: Any) -> dict[str, Any]:
    return requests.get(f"{server.url}/aslseg/status", timeout=60).json()


def wait_for(server: Any, *states: str, seconds: float = 300) -> dict[str, Any]:
    """Until the round is in one of these states."""
    end = time.monotonic() + seconds
    while (found := status(server))["progress"]["state"] not in states:
        assert time.monotonic() < end, f"{found['progress']}\n{server.log[-3000:]}"
        time.sleep(0.3)
    return found


def middle(server: Any, case: str) -> list[int]:
    """A voxel deep in the liver."""
    path = Path(server.studies).with_name("studies_truth") / f"{case}.nii.gz"
    inside = np.argwhere(np.asarray(nib.load(path).dataobj) > 0)
    return inside[np.abs(inside - inside.mean(0)).sum(1).argmin()].tolist()


def test_the_first_hour(starting: Any) -> None:
    annotator = SlicerModule(starting.url, starting.folder / "slicer", "ann")
    refused = annotator.errors.MONAILabelClientException
    assert list(annotator.models) == ["sam", "sam_2d"], "nothing is trained yet"

    # the next sample: the module's own request has no model, and gets an answer that it can show
    first = annotator.next_sample("agreement")
    assert annotator.requested == [""]
    assert (annotator.reply["source"], list(annotator.reply["label_names"])) == ("nothing stored", ["liver", "tumour"])
    assert list(annotator.segments) == ["liver", "tumour"]
    case = annotator.next_sample("agreement")
    assert case != first, "asking again means another one"

    # an empty label is a mistake, unless it is submitted once more
    with pytest.raises(refused, match="is empty, so nothing was saved"):
        annotator.submit()

    # clicks while the first round trains; what cannot be submitted cannot be clicked
    wait_for(starting, "running")
    voxel = middle(starting, case)
    with pytest.raises(refused, match="is not one of the labels liver, tumour; valid names are"):
        annotator.click("Segment_1", [voxel])
    annotator.click("liver", [voxel], [[0, 0, voxel[2]]])
    drawn = annotator.segments["liver"]
    assert (drawn[tuple(voxel)], drawn[0, 0, voxel[2]]) == (True, False)
    annotator.submit()
    saved = np.asarray(nib.load(Path(starting.studies) / "labels" / "final" / f"{case}.nii.gz").dataobj)
    assert np.array_equal(saved, drawn.astype(np.uint8))
    assert annotator.next_sample("agreement") not in (first, case)

    # stop, and go on
    assert annotator.client.train_stop()["status"] == "STOPPED"
    wait_for(starting, "interrupted", "failed")
    assert not annotator.client.train_status(check_if_running=True)
    annotator.train()
    wait_for(starting, "done")

    # the next night's models: the better mask is shown, at once, and the module's own request keeps it
    annotator.fetch_info()
    assert next(iter(annotator.models)) == "aslseg"
    case = annotator.next_sample("agreement")
    assert annotator.requested == ["aslseg"]
    assert annotator.reply["source"] == "stored"
    stored = np.asarray(nib.load(Path(starting.studies) / "labels" / "original" / f"{case}.nii.gz").dataobj)
    for value, name in enumerate(("liver", "tumour"), 1):
        assert np.array_equal(annotator.segments[name], stored == value), name
    annotator.click_segmentation("adapter")
    assert annotator.reply["source"] == "stored", "the round has refined this scan"
