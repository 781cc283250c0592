"""Two minutes of clicking: memory and open files of the server stay where they are after the first minute."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS, WARM, CLICKS = 120.0, 60.0, 600


@pytest.mark.slow
def test_the_server_does_not_grow(untrained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from soak import MOST, Soak

    truth = Path(untrained.studies).with_name("studies_truth")
    labels = {case: next(truth.rglob(f"{case}.nii.gz")) for case in ("phantom_000", "phantom_001")}
    soak = Soak(untrained.url, labels, sys.maxsize, SECONDS, WARM, rest=SECONDS / CLICKS)
    soak.run()
    assert soak.done > 100
    for name, (early, late) in soak.growth().items():
        assert late <= MOST * early, f"{name}: {early:.0f} after a minute, {late:.0f} at the end"
