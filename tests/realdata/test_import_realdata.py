"""Real scans as they lie on a disk, brought into a studies folder."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aslseg.cases.importing.plan import Options, Plan, make_plan
from aslseg.cases.importing.transfer import transfer
from aslseg.cases.split import split
from aslseg.cases.studies import read_studies
from aslseg.compute.overlap import dice
from aslseg.settings import Paths, load_settings
from aslseg.volume.dicom_series import find_series, read_stack, stack

pytestmark = pytest.mark.realdata

SETTINGS = load_settings({}, env={})[0]


def import_into(studies: Path, source: Path, options: Options) -> Plan:
    plan = make_plan(source, Paths(SETTINGS, studies), options, SETTINGS)
    assert plan.questions == []
    done = transfer(plan, studies, SETTINGS, options.link)
    assert [d for d in done if d.notes or d.scan != "written"] == []
    return plan


def test_a_dicom_series_has_the_grid_of_its_true_mask(data: Path) -> None:
    (series,) = find_series(data / "ct_dicom")
    volume = read_stack(stack(series))
    truth = nib.load(data / "ct_dicom" / "liver.nii.gz")
    assert volume.array.shape == truth.shape
    np.testing.assert_allclose(volume.affine, truth.affine, atol=1e-3)
    liver = volume.array[np.asarray(truth.dataobj) > 0]
    assert 60 < np.median(liver) < 160  # HU of an enhanced liver


def test_a_dicom_folder_with_its_mask_is_imported(data: Path, tmp_path: Path) -> None:
    plan = import_into(tmp_path / "studies", data / "ct_dicom", Options())
    case = plan.pairs[0].case
    written = nib.load(tmp_path / "studies" / "labels" / "final" / f"{case}.nii.gz")
    truth = nib.load(data / "ct_dicom" / "liver.nii.gz")
    assert dice(np.asarray(written.dataobj) == 1, np.asarray(truth.dataobj) > 0) == 1
    again = transfer(plan, tmp_path / "studies", SETTINGS)
    assert [(d.scan, d.label) for d in again] == [("unchanged", "unchanged")]


def test_scans_and_labels_of_lits_keep_their_patients(data: Path, tmp_path: Path) -> None:
    import_into(tmp_path, data / "lits_tumour", Options(only="images/lits_0[01][07]*", link=True))
    studies = read_studies(tmp_path)
    assert set(studies.final) == set(studies.images) == {"lits_000", "lits_007", "lits_010"}
    assert studies.patients["lits_007"] == studies.patients["lits_010"] == "p06"
    assert len({c.role for c in split(studies, 0.2) if c.patient == "p06"}) == 1
