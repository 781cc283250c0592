"""Which cases a round takes, and which it leaves out."""

import os

import numpy as np
import pytest

from aslseg.cases.studies import read_studies
from aslseg.errors import BadSettingsError
from aslseg.rounds.steps.cases import prepare_cases
from aslseg.settings import Paths, Settings
from aslseg.types import Volume, no_progress
from aslseg.volume.io import read_image, write_image, write_label
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


def gather(root, **conf):
    settings = Settings(min_free_gb=0, model_dir=str(root.parent / "models"), **conf)
    return prepare_cases(read_studies(root), settings, Paths(settings, root), (), no_progress)


def test_a_scan_that_is_not_in_hu_is_left_out_until_it_is_confirmed(studies):
    cases = gather(studies)
    assert list(cases.skipped) == ["phantom_004"]
    assert "below 0 HU" in cases.skipped["phantom_004"]
    assert sorted(c.id for c in cases.without_label) == ["phantom_002", "phantom_003"]
    (studies / "patients.csv").write_text("case;patient;intensities\nphantom_004;P4;confirmed\n")
    assert gather(studies).skipped == {}


def test_what_was_prepared_for_an_earlier_label_does_not_stay(studies):
    gather(studies)
    cache = studies / ".aslseg" / "cache"
    used, earlier = sorted(cache.glob("*.npy")), cache / "phantom_000-0123456789abcdef.image.npy"
    earlier.write_bytes(b"of a label that was saved again")
    for path in (*used, earlier):
        os.utime(path, (0, 0))
    gather(studies)
    assert sorted(cache.glob("*.npy")) == used


def test_a_table_of_patients_that_cannot_be_read_starts_nothing(studies):
    (studies / "patients.csv").write_text("case,patient\nphantom_000,\n")
    with pytest.raises(BadSettingsError, match=r"patients\.csv: line 2: no patient"):
        gather(studies)


def redraw(studies, table):
    """Change the values of all labels."""
    for path in sorted((studies / "labels" / "final").iterdir()):
        volume = read_image(path)
        write_label(path, np.array(table, np.uint8)[volume.array.astype(int)], volume.affine)


def test_a_nested_label_that_nobody_drew_is_learned_from_synthetic_ones_where_there_are_any(studies):
    redraw(studies, [0, 1, 1])
    assert any(
        "no training label holds 'tumour': it is learned from synthetic ones alone" in w
        for w in gather(studies).warnings
    )
    for conf in ({"nested_synthetic": 0}, {"nested_fraction": 0}, {"nested": ()}):
        found = gather(studies, **conf).warnings
        assert any("no training label holds 'tumour': it cannot be learned" in w for w in found)


def test_a_label_without_the_parent_that_others_show_is_left_out(studies):
    everything = gather(studies, validation_fraction=0)
    before = sorted(c.id for c in everything.train)
    path = studies / "labels" / "final" / f"{before[0]}.nii.gz"
    volume = read_image(path)
    write_label(path, np.array([0, 0, 2], np.uint8)[volume.array.astype(int)], volume.affine)
    found = gather(studies, validation_fraction=0)
    assert sorted(c.id for c in found.train) == before[1:]
    reason = f"{before[0]} is labelled with tumour but without liver around it: nothing is learned from this label"
    assert found.skipped[before[0]].startswith(reason)
    assert before[0] not in gather(studies, nested=()).skipped


def test_lesions_that_nobody_drew_a_parent_around_are_labels_like_others(studies):
    redraw(studies, [0, 0, 2])
    found = gather(studies)
    assert found.train
    assert not any("without liver" in reason for reason in found.skipped.values())
    # without a parent there is nothing to be synthetic in
    assert any("no training label holds 'liver': it cannot be learned" in w for w in found.warnings)
