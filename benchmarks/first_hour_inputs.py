"""The inputs of `bench_first_hour.py`: data as it lies on people's disks, and the code that gets it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np

from aslseg.cases.importing.plan import Options, make_plan
from aslseg.cases.importing.transfer import transfer
from aslseg.cases.split import split
from aslseg.cases.studies import read_studies
from aslseg.rounds.steps.cases import prepare_cases
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.settings import Paths, Settings
from aslseg.types import no_progress
from aslseg.volume.io import read_image
from aslseg.volume.phantom import make_phantom

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # generated DICOM series
from synthetic_dicom import CORONAL, make_series, write_series

AFFINE = np.diag([-1.5, -1.5, 3.0, 1.0])
SHAPE = (32, 32, 16)
BODY = make_phantom(3, 0, shape=SHAPE)[0].array
TRUTH = make_phantom(3, 0, shape=SHAPE)[1]
INPUTS: list[tuple[str, str, Callable[[Path], str | None]]] = []
"""Group, input, and the function that makes it and gives it on; what it returns is said of an accepted input."""


def given(group: str, name: str) -> Callable[[Callable[[Path], str | None]], Callable[[Path], str | None]]:
    """Add an input to the table."""

    def add(function: Callable[[Path], str | None]) -> Callable[[Path], str | None]:
        INPUTS.append((group, name, function))
        return function

    return add


def settings(folder: Path, **conf: Any) -> Settings:
    """Settings that keep everything below the folder."""
    return Settings(min_free_gb=0, model_dir=str(folder / "models"), **conf)


def scan(path: Path, array: np.ndarray = BODY, affine: np.ndarray = AFFINE, unit: str = "mm") -> Path:
    """A scan as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.asarray(array, np.float32), affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def label(path: Path, array: np.ndarray = TRUTH, affine: np.ndarray = AFFINE) -> Path:
    """A label as NIfTI, in the type of the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def segmentation(path: Path, layers: np.ndarray, segments: list[tuple[str, int, int]], **more: str) -> Path:
    """A ``.seg.nrrd`` of 3D Slicer: name, value and layer of each segment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = [[-1.5, 0, 0], [0, -1.5, 0], [0, 0, 3.0]]
    header: dict[str, Any] = {"space": "right-anterior-superior", "space origin": [0, 0, 0], "encoding": "gzip", **more}
    header |= {"kinds": ["domain"] * 3, "space directions": axes}
    if layers.ndim == 4:
        header |= {"kinds": ["list"] + ["domain"] * 3, "space directions": [[np.nan] * 3, *axes]}
    for n, (name, value, layer) in enumerate(segments):
        header |= {f"Segment{n}_Name": name, f"Segment{n}_LabelValue": str(value), f"Segment{n}_Layer": str(layer)}
    nrrd.write(str(path), layers, header)
    return path


def submitted(folder: Path, upload: Path, segments: Sequence[str] = (), **conf: Any) -> str:
    """What the server saves of a label that is submitted for a scan, with the names of its segments if it has any."""
    studies = scan(folder / "s" / "a.nii.gz").parent
    chosen = settings(folder, **conf)
    store = StudiesDatastore(str(studies), chosen, Paths(chosen, studies))
    try:
        store.save_label("a", str(upload), "final", {"label_info": [{"name": name} for name in segments]})
    finally:
        store.flush()  # it is written behind, and the folder is removed at once
    saved = np.asarray(nib.load(studies / "labels" / "final" / "a.nii.gz").dataobj)
    counts = {name: int((saved == value).sum()) for name, value in chosen.label_set.values.items()}
    return "saved as " + ", ".join(f"{name} {count}" for name, count in counts.items()) + " voxels"


def rounded(folder: Path, **conf: Any) -> str:
    """What a round makes of the cases of ``folder / "s"``, before it trains."""
    chosen = settings(folder, **conf)
    cases = prepare_cases(read_studies(folder / "s"), chosen, Paths(chosen, folder / "s"), (), no_progress)
    kept = len(cases.train) + len(cases.validation) + len(cases.unlabelled) + len(cases.predict_only)
    left_out = "; ".join(cases.skipped.values())
    return f"left out: {left_out}" if left_out else f"{kept} scans used"


def studies_with(folder: Path, odd: np.ndarray) -> str:
    """Four scans in HU, three of them labelled, and an odd one; then the first stage of a round."""
    for n in range(4):
        scan(folder / "s" / f"c{n}.nii.gz", BODY + n)
        if n < 3:
            label(folder / "s" / "labels" / "final" / f"c{n}.nii.gz")
    scan(folder / "s" / "odd.nii.gz", odd)
    return rounded(folder)


def imported(source: Path, folder: Path, *mapping: str) -> str:
    """What `aslseg import` makes of a folder."""
    chosen = settings(folder)
    plan = make_plan(source, Paths(chosen, folder / "studies"), Options(mapping=mapping), chosen)
    if plan.questions:
        return f"asks: {plan.questions[0]}"
    done = transfer(plan, folder / "studies", chosen)
    failed = [note for d in done if "failed" in (d.scan, d.label) for note in d.notes]
    for note in (note for d in done for note in d.notes):
        logging.getLogger("aslseg").warning("%s", note)
    return f"refused: {failed[0]}" if failed else f"read as {plan.layout}, {len(done)} imported"


@given("scan", "both form codes 0")
def _(folder: Path) -> None:
    image = nib.Nifti1Image(BODY.astype(np.float32), None)
    image.header.set_zooms((1.5, 1.5, 3))
    nib.save(image, folder / "a.nii.gz")
    read_image(folder / "a.nii.gz")


@given("scan", "sform and qform 8 mm apart")
def _(folder: Path) -> None:
    image = nib.Nifti1Image(BODY.astype(np.float32), AFFINE)
    moved = AFFINE.copy()
    moved[:3, 3] = 8
    image.set_sform(moved, 2)
    image.set_qform(AFFINE, 1)
    nib.save(image, folder / "a.nii.gz")
    read_image(folder / "a.nii.gz")


@given("scan", "xyzt_units micrometres")
def _(folder: Path) -> str:
    read = read_image(scan(folder / "a.nii.gz", affine=np.diag([800.0, 800, 800, 1]), unit="micron"))
    return f"{read.spacing[0]:g} mm"


@given("scan", "xyzt_units metres")
def _(folder: Path) -> None:
    read_image(scan(folder / "a.nii.gz", affine=np.diag([0.0015, 0.0015, 0.003, 1]), unit="meter"))


@given("scan", "axes that are not at right angles")
def _(folder: Path) -> None:
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.4
    image = nib.Nifti1Image(BODY.astype(np.float32), sheared)
    image.set_qform(None, 0)
    nib.save(image, folder / "a.nii.gz")
    read_image(folder / "a.nii.gz")


@given("scan", "a time series")
def _(folder: Path) -> None:
    read_image(scan(folder / "a.nii.gz", np.stack([BODY, BODY], -1)))


@given("scan", ".nii.gz that is not gzipped")
def _(folder: Path) -> str:
    scan(folder / "a.nii").rename(folder / "a.nii.gz")
    return f"read, {read_image(folder / 'a.nii.gz').array.shape}"


@given("scan", "cut off in the middle")
def _(folder: Path) -> None:
    path = scan(folder / "a.nii.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read_image(path)


@given("scan", "NaN outside the field of view")
def _(folder: Path) -> None:
    read_image(scan(folder / "a.nii.gz", np.where(np.indices(SHAPE)[0] < 2, np.nan, BODY)))


@given("scan", "a NRRD whose voxels lie in another file")
def _(folder: Path) -> None:
    nrrd.write(str(folder / "a.nhdr"), BODY.astype(np.float32))
    (folder / "a.nhdr").rename(folder / "a.nrrd")
    read_image(folder / "a.nrrd")


@given("scan", "micrometres written as millimetres (40 mm voxels)")
def _(folder: Path) -> str:
    for n in range(3):
        scan(folder / "s" / f"c{n}.nii.gz", BODY + n)
        label(folder / "s" / "labels" / "final" / f"c{n}.nii.gz")
    scan(folder / "s" / "wrong.nii.gz", np.tile(BODY, (4, 4, 4)), np.diag([40.0, 40, 40, 1]))
    return rounded(folder, max_working_voxels=2e4)


@given("scan", "a link to a disk that is not mounted")
def _(folder: Path) -> None:
    scan(folder / "a.nii.gz")
    (folder / "b.nii.gz").symlink_to("/not/mounted/b.nii.gz")
    read_studies(folder)


@given("scan", "a.nii.gz and a.nrrd")
def _(folder: Path) -> None:
    scan(folder / "a.nii.gz")
    nrrd.write(str(folder / "a.nrrd"), BODY.astype(np.float32))
    read_studies(folder)


@given("scan", "a segmentation among the scans")
def _(folder: Path) -> None:
    scan(folder / "a.nii.gz")
    label(folder / "a_seg.nii.gz")
    read_studies(folder)


@given("label", ".seg.nrrd, the tumour drawn first")
def _(folder: Path) -> str:
    swapped = np.select([TRUTH == 1, TRUTH == 2], [2, 1], 0).astype(np.uint8)
    return submitted(folder, segmentation(folder / "l.seg.nrrd", swapped, [("tumour", 1, 0), ("liver", 2, 0)]))


@given("label", ".seg.nrrd, overlapping segments in layers")
def _(folder: Path) -> str:
    layers = np.stack([TRUTH > 0, TRUTH == 2]).astype(np.uint8)
    return submitted(folder, segmentation(folder / "l.seg.nrrd", layers, [("liver", 1, 0), ("tumour", 1, 1)]))


@given("label", ".seg.nrrd with a segment 'Tumor'")
def _(folder: Path) -> str:
    return submitted(folder, segmentation(folder / "l.seg.nrrd", TRUTH, [("liver", 1, 0), ("Tumor", 2, 0)]))


@given("label", "'LÄSION' in another Unicode form than in `labels`")
def _(folder: Path) -> str:
    upload = label(folder / "l.nii.gz", (TRUTH > 0).astype(np.uint8))
    return submitted(folder, upload, ["LA\u0308SION"], labels="l\u00e4sion")


@given("label", "0 and 255, one label")
def _(folder: Path) -> str:
    return submitted(folder, label(folder / "l.nii.gz", np.where(TRUTH > 0, 255, 0).astype(np.uint8)), labels="liver")


@given("label", "0 and 255, two labels")
def _(folder: Path) -> str:
    return submitted(folder, label(folder / "l.nii.gz", np.where(TRUTH > 0, 255, 0).astype(np.uint8)))


@given("label", "0.9961 and 1.9922 by scl_slope")
def _(folder: Path) -> str:
    return submitted(folder, label(folder / "l.nii.gz", (TRUTH * 0.9961).astype(np.float32)))


@given("label", "resampled linearly")
def _(folder: Path) -> str:
    return submitted(folder, label(folder / "l.nii.gz", ((TRUTH + np.roll(TRUTH, 1, 0)) / 2).astype(np.float32)))


@given("label", "axes in another order, at the same place")
def _(folder: Path) -> str:
    turned = nib.Nifti1Image(TRUTH, AFFINE).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    return submitted(folder, label(folder / "l.nii.gz", np.asarray(turned.dataobj), turned.affine))


@given("label", "on a cropped copy of its scan")
def _(folder: Path) -> str:
    return submitted(folder, label(folder / "l.nii.gz", TRUTH[2:-2]))


@given("label", "empty")
def _(folder: Path) -> str:
    return submitted(folder, label(folder / "l.nii.gz", np.zeros_like(TRUTH)))


@given("label", "of no scan: 'ana' for 'anna'")
def _(folder: Path) -> None:
    scan(folder / "anna.nii.gz")
    label(folder / "labels" / "final" / "ana.nii.gz")
    read_studies(folder)


@given("intensities", "one scan shifted by 1024")
def _(folder: Path) -> str:
    return studies_with(folder, BODY + 1024)


@given("intensities", "one scan scaled to 0..1")
def _(folder: Path) -> str:
    return studies_with(folder, ((BODY + 160) / 400).clip(0, 1))


@given("intensities", "an MR among CTs")
def _(folder: Path) -> str:
    return studies_with(folder, np.where(BODY < -500, 0, 300 + BODY / 2))


def patients(folder: Path, raw: bytes) -> str:
    """Roles of four scans, three of one patient."""
    for n in range(4):
        scan(folder / f"c{n}.nii.gz", BODY + n)
        label(folder / "labels" / "final" / f"c{n}.nii.gz")
    (folder / "patients.csv").write_bytes(raw)
    return ", ".join(f"{c.id} {c.role}" for c in split(read_studies(folder), 0.2))


@given("patients.csv", "Excel: semicolons, capitals, cp1252")
def _(folder: Path) -> str:
    return patients(folder, "Case;Patient\r\nc0;Müller\r\nc1;Müller\r\nc2;Müller\r\nc3;Li\r\n".encode("cp1252"))


@given("patients.csv", "Excel: Unicode text (UTF-16, tabs)")
def _(folder: Path) -> str:
    return patients(folder, "case\tpatient\r\nc0\tMüller\r\nc1\tMüller\r\nc2\tMüller\r\nc3\tLi\r\n".encode("utf-16"))


@given("patients.csv", "a line without a patient")
def _(folder: Path) -> str:
    return patients(folder, b"case,patient\nc0,A\nc1,\n")


@given("DICOM", "a slice is missing")
def _(folder: Path) -> str:
    slices = make_series()
    del slices[5]
    return imported(write_series(folder / "in", slices), folder)


@given("DICOM", "gantry tilt")
def _(folder: Path) -> str:
    return imported(write_series(folder / "in", make_series(step=(0, 0.8, 3))), folder)


@given("DICOM", "a localizer in the series")
def _(folder: Path) -> str:
    slices = make_series()
    write_series(folder / "in", make_series(1, orientation=CORONAL, like=slices[0]), "loc")
    return imported(write_series(folder / "in", slices), folder)


@given("DICOM", "two phases in one series")
def _(folder: Path) -> str:
    slices = make_series()
    late = make_series(like=slices[0], RescaleIntercept=-900)
    write_series(folder / "in", late, "late")
    return imported(write_series(folder / "in", slices), folder)


@given("layout", "MSD, labels called 'cancer'")
def _(folder: Path) -> str:
    scan(folder / "in" / "imagesTr" / "liver_0.nii.gz")
    label(folder / "in" / "labelsTr" / "liver_0.nii.gz")
    text = '{"labels": {"0": "background", "1": "liver", "2": "cancer"}}'
    (folder / "in" / "dataset.json").write_text(text)
    return imported(folder / "in", folder)


@given("layout", "the same with --map cancer=tumour")
def _(folder: Path) -> str:
    scan(folder / "in" / "imagesTr" / "liver_0.nii.gz")
    label(folder / "in" / "labelsTr" / "liver_0.nii.gz")
    text = '{"labels": {"0": "background", "1": "liver", "2": "cancer"}}'
    (folder / "in" / "dataset.json").write_text(text)
    return imported(folder / "in", folder, "cancer=tumour")


@given("studies folder", "moved to another disk")
def _(folder: Path) -> str:
    scan(folder / "old" / "a.nii.gz")
    before = Paths(Settings(), folder / "old")
    before.remember_models()
    (folder / "old").rename(folder / "new")
    found = Paths(Settings(), folder / "new").models == before.models
    return "its models are found" if found else "refused: its models are not found"
