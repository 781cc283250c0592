"""`aslseg rank` shows what the last round measured, and measures only what has changed since."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.files import sha256
from aslseg.models.cascade import Cascade, CascadeInput
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.label_files.rollback import roll_back
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion import promotion
from aslseg.rounds.ranking import rank_studies
from aslseg.rounds.run import run_round, train_stage
from aslseg.rounds.steps.predictions import find_prediction
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image
from tiny_rounds import tiny_settings, tiny_studies

WAITING = ["phantom_003", "phantom_004"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the id of each scan that is measured."""
    found: list[str] = []
    judge = promotion.judge
    assess = promotion.assess

    def noting(state: Any, *args: Any) -> None:
        assess(state, *args)
        found.extend(state.assessments)

    monkeypatch.setattr(promotion, "assess", noting)
    monkeypatch.setattr(promotion, "judge", judge)
    return found


@pytest.fixture
def rounded(tmp_path: Path, plausible: None, measured: list[str]) -> tuple[Path, Settings]:
    """A studies folder after one round."""
    studies, settings = tiny_studies(tmp_path, cases=5), tiny_settings(tmp_path)
    run_round(studies, settings)
    assert measured == WAITING
    measured.clear()
    return studies, settings


def test_nothing_is_measured_while_nothing_changes(rounded: Any, measured: list[str], tmp_path: Path) -> None:
    studies, settings = rounded
    stored = {s.case: s.agreement for s in Ledger(Paths(settings, studies).ledger).scores()}
    assert rank_studies(studies, settings) == stored
    assert list(stored.values()) == sorted(stored.values())
    assert measured == []
    conf = settings.model_dump(exclude_unset=True)
    code = (
        "import sys; from pathlib import Path; from aslseg.rounds.ranking import rank_studies; "
        "from aslseg.settings import Settings; "
        f"rank_studies(Path({str(studies)!r}), Settings(**{conf!r})); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_a_new_and_a_replaced_scan_are_measured(rounded: Any, measured: list[str]) -> None:
    studies, settings = rounded
    before = {s.case: s for s in Ledger(Paths(settings, studies).ledger).scores()}
    shutil.copy(studies / "phantom_000.nii.gz", studies / "new.nii.gz")
    assert set(rank_studies(studies, settings)) == {*WAITING, "new"}
    assert measured == ["new"]
    after = {s.case: s for s in Ledger(Paths(settings, studies).ledger).scores()}
    assert [after[c].round for c in WAITING] == [1, 1]
    assert [after[c].agreement for c in WAITING] == [before[c].agreement for c in WAITING]
    measured.clear()
    times = (studies / "phantom_003.nii.gz").stat()
    shutil.copy(studies / "phantom_001.nii.gz", studies / "phantom_003.nii.gz")
    os.utime(studies / "phantom_003.nii.gz", ns=(times.st_atime_ns, times.st_mtime_ns))
    rank_studies(studies, settings)
    assert measured == ["phantom_003"], "although the file has its old date, as after cp -p"


def test_what_the_adaptation_network_drew_is_found_again(rounded: Any) -> None:
    studies, settings = rounded
    paths, scan = Paths(settings, studies), studies / "phantom_003.nii.gz"
    score = next(s for s in Ledger(paths.ledger).scores() if s.case == "phantom_003")
    found = find_prediction(ModelKind.ADAPTER, score, sha256(scan), paths, settings)
    assert found is not None
    files = Ledger(paths.ledger).rounds()[0].summary["models"]
    models = ModelSet({kind: Path(files[kind.value]) for kind in PUBLISHED_KINDS})
    cascade = Cascade.load(models, settings)
    given = CascadeInput.from_volume(read_image(scan), settings, models.spacing)
    computed = cascade.outputs(given)[ModelKind.ADAPTER].regions
    assert np.abs(found.regions - computed).max() < 0.02, "each stage is kept in 8 bits"
    assert find_prediction(ModelKind.ADAPTER, score, "0" * 64, paths, settings) is None, "another version of the scan"
    other = settings.model_copy(update={"overlap": 0.75})
    assert find_prediction(ModelKind.ADAPTER, score, sha256(scan), paths, other) is None
    assert find_prediction(ModelKind.CANVAS, score, sha256(scan), paths, settings) is None, "the round had none"


def test_a_human_label_takes_a_scan_off_the_list(rounded: Any, measured: list[str]) -> None:
    studies, settings = rounded
    shutil.copy(studies.with_name("studies_truth") / "phantom_003.nii.gz", studies / "labels" / "final")
    assert list(rank_studies(studies, settings)) == ["phantom_004"]
    assert measured == []


def test_all_are_measured_with_other_models_or_settings(rounded: Any, measured: list[str]) -> None:
    studies, _ = rounded
    other = tiny_settings(studies.parent, seed=5, gate_tolerance=1.0)
    train_stage("ssl", studies, other)
    rank_studies(studies, other)
    assert measured == WAITING
    measured.clear()
    rank_studies(studies, other)
    assert measured == []
    rank_studies(studies, tiny_settings(studies.parent, seed=5, gate_tolerance=1.0, overlap=0.5))
    assert measured == WAITING, "predicted with another overlap"


def test_a_round_that_was_rolled_back_no_longer_counts(rounded: Any, measured: list[str]) -> None:
    studies, settings = rounded
    first = sha256(studies / "phantom_003.nii.gz")
    (studies / "phantom_003.nii.gz").rename(studies / "again.nii.gz")
    run_round(studies, settings)
    measured.clear()
    roll_back(Paths(settings, studies), 2)
    assert set(rank_studies(studies, settings)) == {"again", "phantom_004"}
    assert set(measured) <= {"again", "phantom_004"}
    assert sha256(studies / "again.nii.gz") == first


def test_a_scan_that_a_round_could_not_read_is_not_tried_each_time(rounded: Any, measured: list[str]) -> None:
    studies, settings = rounded
    (studies / "cut.nii.gz").write_bytes((studies / "phantom_003.nii.gz").read_bytes()[:500])
    run_round(studies, settings)
    measured.clear()
    assert set(rank_studies(studies, settings)) == set(WAITING)
    assert measured == []
    shutil.copy(studies / "phantom_000.nii.gz", studies / "cut.nii.gz")
    assert set(rank_studies(studies, settings)) == {*WAITING, "cut"}
