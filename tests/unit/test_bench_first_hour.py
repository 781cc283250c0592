"""What comes of data as it lies on people's disks; the table in docs/lab is printed by the same script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from bench_first_hour import table

NOTED, PASSED = "accepted, with a note", "left out"
EXPECTED = {
    "scan: both form codes 0": (NOTED, "from the origin"),
    "scan: sform and qform 8 mm apart": (NOTED, "up to 8 mm apart"),
    "scan: xyzt_units micrometres": (NOTED, "micrometres"),
    "scan: xyzt_units metres": (NOTED, "metres"),
    "scan: axes that are not at right angles": (NOTED, "3D Slicer cannot open it"),
    "scan: a time series": ("refused", "expected one 3-D volume"),
    "scan: .nii.gz that is not gzipped": ("accepted", "read"),
    "scan: cut off in the middle": ("refused", "truncated"),
    "scan: NaN outside the field of view": ("refused", "1024 voxels are NaN"),
    "scan: a NRRD whose voxels lie in another file": ("refused", "another file"),
    "scan: micrometres written as millimetres (40 mm voxels)": (PASSED, "correct its voxel size"),
    "scan: a link to a disk that is not mounted": (PASSED, "/not/mounted"),
    "scan: a.nii.gz and a.nrrd": (PASSED, "same id"),
    "scan: a segmentation among the scans": (PASSED, "looks like a segmentation"),
    "label: .seg.nrrd, the tumour drawn first": ("accepted", "liver 723, tumour 162"),
    "label: .seg.nrrd, overlapping segments in layers": ("accepted", "liver 723, tumour 162"),
    "label: .seg.nrrd with a segment 'Tumor'": ("refused", "did you mean 'tumour'?"),
    "label: 'LÄSION' in another Unicode form than in `labels`": ("accepted", "läsion 885"),
    "label: 0 and 255, one label": (NOTED, "255 as 1"),
    "label: 0 and 255, two labels": ("refused", "1 = liver, 2 = tumour"),
    "label: 0.9961 and 1.9922 by scl_slope": (NOTED, "0.9961 as 1"),
    "label: resampled linearly": ("refused", "resample by nearest voxel"),
    "label: axes in another order, at the same place": ("accepted", "liver 723, tumour 162"),
    "label: on a cropped copy of its scan": ("refused", "its scan has"),
    "label: empty": ("refused", "submit it once more"),
    "label: of no scan: 'ana' for 'anna'": (PASSED, "did you mean 'anna'?"),
    "intensities: one scan shifted by 1024": (PASSED, "below 0 HU"),
    "intensities: one scan scaled to 0..1": (PASSED, "nearly all intensities are the same"),
    "intensities: an MR among CTs": (PASSED, "below 0 HU"),
    "patients.csv: Excel: semicolons, capitals, cp1252": ("accepted", "c2 train, c3 validation"),
    "patients.csv: Excel: Unicode text (UTF-16, tabs)": ("accepted", "c2 train, c3 validation"),
    "patients.csv: a line without a patient": ("refused", "line 3"),
    "DICOM: a slice is missing": ("refused", "slices are missing: 1"),
    "DICOM: gantry tilt": ("refused", "gantry tilt, 14.9 degrees"),
    "DICOM: a localizer in the series": (NOTED, "a localizer"),
    "DICOM: two phases in one series": ("refused", "phases, echoes"),
    "layout: MSD, labels called 'cancer'": ("asks", "--map"),
    "layout: the same with --map cancer=tumour": ("accepted", "1 imported"),
    "studies folder: moved to another disk": ("accepted", "models are found"),
}


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, str]]:
    return {name: (what, text) for name, what, text, _ in table()}


def test_the_table_has_every_input_once(rows: dict[str, tuple[str, str]]) -> None:
    assert list(rows) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_happens_to_an_input(rows: dict[str, tuple[str, str]], name: str) -> None:
    what, text = EXPECTED[name]
    assert rows[name][0] == what
    assert text in rows[name][1]
