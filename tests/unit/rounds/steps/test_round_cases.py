"""Which cases a round takes, and which it leaves out."""

import numpy as np
import pytest

from aslseg.cases.studies import read_studies
from aslseg.errors import BadSettingsError
from aslseg.rounds.steps.cases import prepare_cases
from aslseg.settings import Paths, Settings
from aslseg.types import Volume, no_progress
from aslseg.volume.io import read_image, write_image
from aslseg.volume.phantom import write_studies


@pytest.fixture
def studies(tmp_path):
    """Five scans, two of them labelled; the last one has lost its rescale intercept."""
    root = tmp_path / "studies"
    write_studies(root, 5, 2, 1, shape=(24, 24, 8))
    scan = root / "phantom_004.nii.gz"
    volume = read_image(scan)
    write_image(scan, Volume(np.asarray(volume.array) + 1024, volume.affine))
    return root


def gather(root):
    settings = Settings(min_free_gb=0, model_dir=str(root.parent / "models"))
    return prepare_cases(read_studies(root), settings, Paths(settings, root), (), no_progress)


def test_a_scan_that_is_not_in_hu_is_left_out_until_it_is_confirmed(studies):
    cases = gather(studies)
    assert list(cases.skipped) == ["phantom_004"]
    assert "below 0 HU" in cases.skipped["phantom_004"]
    assert sorted(c.id for c in cases.without_label) == ["phantom_002", "phantom_003"]
    (studies / "patients.csv").write_text("case;patient;intensities\nphantom_004;P4;confirmed\n")
    assert gather(studies).skipped == {}


def test_a_table_of_patients_that_cannot_be_read_starts_nothing(studies):
    (studies / "patients.csv").write_text("case,patient\nphantom_000,\n")
    with pytest.raises(BadSettingsError, match=r"patients\.csv: line 2: no patient"):
        gather(studies)
