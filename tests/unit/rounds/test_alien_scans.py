"""A night on a pool with scans that do not belong there promotes none of them, even where both networks agree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from aslseg.models.cascade import CascadeInput, StageOutput
from aslseg.models.kinds import ModelKind
from aslseg.rounds.run import run_round
from aslseg.rounds.steps import pipeline
from aslseg.settings import Settings
from aslseg.volume.io import write_image, write_label
from aslseg.volume.phantom import make_phantom
from tiny_rounds import tiny_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from alien_scans import ALIENS, alien

SHAPE = (32, 32, 12)
LABELLED, UNLABELLED = 5, 9
WINDOW = (85, 130)
"""HU of a liver; whatever else has them is one too, to networks that know nothing but intensities."""


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Five labelled phantoms, nine others, and an alien of each kind."""
    root = tmp_path / "studies"
    for n in range(LABELLED + UNLABELLED + len(ALIENS)):
        scan, label = make_phantom(3, n, shape=SHAPE)
        kind = n - LABELLED - UNLABELLED
        if kind >= 0:
            name = list(ALIENS)[kind]
            write_image(root / f"alien_{name.replace(' ', '_')}.nii.gz", alien(name, scan, label, n))
            continue
        write_image(root / f"scan_{n:02}.nii.gz", scan)
        if n < LABELLED:
            write_label(root / "labels" / "final" / f"scan_{n:02}.nii.gz", (label > 0).astype(np.uint8), scan.affine)
    (root / "patients.csv").write_text("case,patient,role\n" + "".join(f"scan_{n:02},p{n},train\n" for n in range(5)))
    return root


@pytest.fixture
def credulous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that call the largest object of the liver's intensities a liver, in any scan, and always agree."""

    def compute(kind: ModelKind, model: Any, given: CascadeInput, before: Any, settings: Settings) -> StageOutput:
        low, high = ((v - settings.window_low) / (settings.window_high - settings.window_low) for v in WINDOW)
        inside = ndimage.binary_opening((given.image > low) & (given.image < high))
        pieces, count = ndimage.label(inside)
        largest = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1 if count else inside
        return StageOutput(largest[None].astype(np.float32))

    monkeypatch.setattr(pipeline, "compute", compute)


@pytest.mark.usefixtures("quick", "credulous")
def test_a_night_promotes_no_alien(studies: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, labels="liver", nested="", promote_fraction=1, validation_fraction=0)
    summary = run_round(studies, settings)
    promoted = summary["promoted"] + summary["withdrawn"]
    assert not [case for case in promoted if case.startswith("alien")]
    assert len(promoted) >= UNLABELLED - 2, "the others are"
    refused = {c: d["reasons"] for c, d in summary["decisions"].items() if c.startswith("alien")} | summary["skipped"]
    assert len(refused) == len(ALIENS)
    assert all(refused.values())


@pytest.mark.usefixtures("quick", "credulous")
def test_without_the_check_of_whole_scans_aliens_are_promoted(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the verdict on masks cannot see."""
    from aslseg.rounds.steps import cases

    monkeypatch.setattr(cases, "unlike_labelled", lambda *_: {})
    settings = tiny_settings(tmp_path, labels="liver", nested="", promote_fraction=1, validation_fraction=0)
    summary = run_round(studies, settings)
    assert [case for case in summary["promoted"] + summary["withdrawn"] if case.startswith("alien")]
