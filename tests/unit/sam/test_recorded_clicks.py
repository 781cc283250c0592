"""Click replies are those recorded before, voxel for voxel; :mod:`recorded_clicks` says how they were recorded.

Two changes of the replies were wanted since version 0.1, and are recorded anew:

* A click on a nested label means it and not its parent: "another annotator's click on another object" (4,141 to 96
  voxels), "a background click beside it", "the other annotator goes on", "repair: the tumour in it" and "OHIF:
  vista3d's points and class".
* A click on what the automatic mask lacks keeps the mask (1,027 to 4,072 voxels): "repair: what is missing below" and
  "and with it again".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recorded_clicks as recorded

RECORDING = json.loads(recorded.REQUESTS.read_text())
REQUESTS = RECORDING["requests"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[np.ndarray, dict[str, Any]]]]:
    """All requests one after the other, since a reply depends on those before it."""
    folder: Path = tmp_path_factory.mktemp("recorded")
    assert recorded.write_studies(folder / "studies") == RECORDING["voxels_sha256"], "the phantoms have changed"
    with recorded.without_bfloat16():
        served = recorded.app(folder / "studies", folder / "models")
        yield [recorded.ask(served, request) for request in REQUESTS]


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=[r["name"] for r in REQUESTS])
def test_reply_is_the_recorded_one(number: int, replies: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    request, (mask, told) = REQUESTS[number], replies[number]
    assert list(mask.shape) == request["shape"]
    assert told == request["told"]
    with np.load(recorded.REPLIES) as file:
        expected = recorded.unpacked(file[f"{number:02d}"], mask.shape)
    assert expected.sum() == request["voxels"]
    different, allowed = recorded.differing(mask, expected)
    assert different <= allowed, f"{different} of {expected.sum()} voxels differ, {allowed} may"


def test_recording_covers_what_clients_send() -> None:
    """A recording of empty masks would compare nothing."""
    assert len(REQUESTS) >= 30
    assert sum(r["voxels"] > 50 for r in REQUESTS) >= 30
    assert {r["model"] for r in REQUESTS} == {"sam", "sam_2d"}
    assert {r["told"].get("repaired") for r in REQUESTS} >= {True, False}
