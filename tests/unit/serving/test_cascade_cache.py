"""Stages are computed once for a scan, again when scan or models change, and old scans are let go."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.errors import NoModelError
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.settings import load_settings
from aslseg.ssl.predict import Prediction
from aslseg.types import Volume
from aslseg.volume.io import write_image


class Network:
    """Calls everything brighter than half a liver, and counts how often it was asked."""

    metadata = {"spacing": None}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked = 0

    def run(self, image: np.ndarray, *, regions: bool) -> Prediction:
        assert regions
        self.asked += 1
        liver = (image > 0.5).astype(np.float32)
        return Prediction(np.stack([liver, np.zeros_like(liver)]), notes=("memory ran out",))


class Shelf:
    """Stands in for published models."""

    def __init__(self, **models: Any) -> None:
        self.settings, _ = load_settings({}, env={})
        self.models, self.version = models, "1"

    def hashes(self) -> dict[str, str]:
        return dict.fromkeys(self.models, self.version)

    def get(self, kind: str) -> Any:
        if kind not in self.models:
            raise NoModelError(kind)
        return self.models[kind]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    array = np.zeros((8, 8, 6), np.float32)
    array[2:5] = 200
    write_image(tmp_path / "scan.nii.gz", Volume(array, np.diag([1.0, 1, 2, 1])))
    return tmp_path / "scan.nii.gz"


def test_computed_once_even_when_asked_at_once(path: Path) -> None:
    network = Network()
    scans = CascadeCache(Shelf(ssl=network))  # type: ignore[arg-type]
    threads = [threading.Thread(target=lambda: scans.stage(scans.open(path), "ssl")) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert network.asked == 1
    assert scans.stage(scans.open(path), "ssl")[0, 2:5].all()
    assert scans.open(path).notes == ("memory ran out",)


def test_again_when_models_or_scan_change(path: Path) -> None:
    network = Network()
    shelf = Shelf(ssl=network)
    scans = CascadeCache(shelf)  # type: ignore[arg-type]
    scans.stage(scans.open(path), "ssl")
    shelf.version = "2"
    scans.stage(scans.open(path), "ssl")
    write_image(path, Volume(np.zeros((8, 8, 6), np.float32), np.diag([1.0, 1, 2, 1])))
    assert not scans.stage(scans.open(path), "ssl")[0].any()
    assert network.asked == 3


def test_old_scans_are_let_go(path: Path, tmp_path: Path) -> None:
    network = Network()
    scans = CascadeCache(Shelf(ssl=network), limit=5000)  # type: ignore[arg-type]
    other = tmp_path / "other.nii.gz"
    other.write_bytes(path.read_bytes())
    for scan in (path, other, path, other):
        scans.stage(scans.open(scan), "ssl")
    assert network.asked == 4


def test_a_missing_stage_is_told(path: Path) -> None:
    scans = CascadeCache(Shelf(ssl=Network()))  # type: ignore[arg-type]
    with pytest.raises(NoModelError):
        scans.stage(scans.open(path), "adapter")
