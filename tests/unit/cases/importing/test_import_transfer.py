"""What an import writes: exact, once, never over something else, and whole or not at all."""

from __future__ import annotations

import gzip
import shutil

import numpy as np
import pytest

from aslseg.cases.importing.plan import Options
from aslseg.cases.studies import read_studies
from aslseg.errors import BadSettingsError
from aslseg.volume.io import read_image
from foreign_folders import AFFINE, SHAPE, label, scan
from synthetic_dicom import make_series, write_series


def fill(importing):
    for n in range(3):
        scan(importing.source / "images" / f"a{n}.nii.gz", n)
    label(importing.source / "labels" / "a0.nii.gz", 1, 2)


def test_a_second_import_changes_nothing(importing, listing):
    fill(importing)
    write_series(importing.source.parent / "dicom", make_series(5))
    first = importing.run()
    assert [d.scan for d in first] == ["written"] * 3
    before = listing(importing.studies)
    again = importing.run()
    assert [(d.scan, d.label) for d in again] == [
        ("unchanged", "unchanged"),
        ("unchanged", "none"),
        ("unchanged", "none"),
    ]
    assert listing(importing.studies) == before


def test_a_second_import_of_dicom_changes_nothing(importing, listing):
    write_series(importing.source / "series", make_series(5))
    assert importing.run()[0].scan == "written"
    before = listing(importing.studies)
    assert importing.run()[0].scan == "unchanged"
    assert listing(importing.studies) == before


def test_scans_are_copied_byte_by_byte_and_read_as_studies(importing):
    fill(importing)
    importing.run()
    for n in range(3):
        name = f"a{n}.nii.gz"
        assert (importing.studies / name).read_bytes() == (importing.source / "images" / name).read_bytes()
    studies = read_studies(importing.studies)
    assert list(studies.images) == ["a0", "a1", "a2"]
    assert list(studies.final) == ["a0"]
    assert studies.problems == ()


def test_links_lead_to_the_scans_and_labels_are_files(importing):
    fill(importing)
    importing.run(Options(link=True))
    assert (importing.studies / "a0.nii.gz").resolve() == (importing.source / "images" / "a0.nii.gz").resolve()
    assert not (importing.studies / "labels" / "final" / "a0.nii.gz").is_symlink()
    assert importing.run(Options(link=True))[0].scan == "unchanged"


def test_a_label_that_is_there_is_kept(importing):
    fill(importing)
    mine = label(importing.studies / "labels" / "final" / "a0.nii.gz", 2)
    before = mine.read_bytes()
    done = importing.run()[0]
    assert (done.scan, done.label) == ("written", "kept")
    assert "holds another label, which was kept" in done.notes[0]
    assert mine.read_bytes() == before


def test_a_label_that_comes_later_is_added(importing):
    fill(importing)
    importing.run()
    label(importing.source / "labels" / "a1.nii.gz", 1)
    assert [(d.scan, d.label) for d in importing.run()][1] == ("unchanged", "written")


def test_another_scan_of_the_same_name_is_never_replaced(importing):
    fill(importing)
    there = scan(importing.studies / "a0.nii.gz", 77)
    before = there.read_bytes()
    done = importing.run()
    assert [d.scan for d in done] == ["failed", "written", "written"]
    assert "is another scan; rename one of them" in done[0].notes[0]
    assert there.read_bytes() == before
    assert not (importing.studies / "labels" / "final" / "a0.nii.gz").exists()


def test_a_scan_that_is_there_compressed_is_the_same_scan(importing):
    path = scan(importing.source / "a.nii")
    (importing.studies).mkdir()
    with gzip.open(importing.studies / "a.nii.gz", "wb") as file:
        file.write(path.read_bytes())
    assert importing.run()[0].scan == "unchanged"


def test_a_broken_scan_costs_that_case_only_and_leaves_nothing(importing):
    fill(importing)
    path = importing.source / "images" / "a1.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    done = importing.run()
    assert [d.scan for d in done] == ["written", "failed", "written"]
    assert "a1.nii.gz" in done[1].notes[0]
    assert {p.name for p in importing.studies.iterdir()} == {"a0.nii.gz", "a2.nii.gz", "labels"}


def test_a_label_that_lies_elsewhere_is_refused_and_its_scan_is_imported(importing):
    fill(importing)
    moved = AFFINE.copy()
    moved[0, 3] = 30
    label(importing.source / "labels" / "a1.nii.gz", 1, affine=moved)
    done = importing.run()[1]
    assert (done.scan, done.label) == ("written", "failed")
    assert "30.0 mm" in done.notes[0]
    assert not (importing.studies / "labels" / "final" / "a1.nii.gz").exists()


def test_an_empty_label_is_imported_and_said(importing):
    fill(importing)
    label(importing.source / "labels" / "a1.nii.gz")
    done = importing.run()[1]
    assert (done.label, done.notes) == ("written", ["its label is empty"])


def test_a_value_without_a_meaning_is_asked_about(importing):
    fill(importing)
    label(importing.source / "labels" / "a1.nii.gz", 255)
    (question,) = importing.plan().questions
    assert str(question) == (
        "value 255 in 1 label file is none of the labels (1 liver, 2 tumour); "
        "write --map '255=liver' if it is the liver, '255=0' to leave it out"
    )
    importing.run(Options(mapping=("255=1",)))
    assert importing.final("a1")[:2] == [1, 0]


@pytest.mark.parametrize(("answer", "value"), [("cancer=tumour", 2), ("Cancer=2", 2), ("cancer=0", 0), ("7=1", 1)])
def test_a_name_that_is_not_configured_is_asked_about(importing, answer, value):
    scan(importing.source / "imagesTr" / "a.nii.gz")
    label(importing.source / "labelsTr" / "a.nii.gz", 7, 3)
    (importing.source / "dataset.json").write_text('{"labels": {"3": "LIVER", "7": "cancer"}}')
    (question,) = importing.plan().questions
    assert "value 7, called 'cancer', in 1 label file" in str(question)
    importing.run(Options(mapping=(answer,)))
    assert importing.final("a")[:2] == [value, 1]


def test_the_nearest_name_is_proposed(importing):
    scan(importing.source / "imagesTr" / "a.nii.gz")
    label(importing.source / "labelsTr" / "a.nii.gz", 1)
    (importing.source / "dataset.json").write_text('{"labels": {"1": "Tumor"}}')
    assert "'Tumor=tumour' if it is the tumour" in str(importing.plan().questions[0])


def test_a_file_of_one_label_is_called_after_it(importing):
    scan(importing.source / "s1" / "ct.nii.gz")
    label(importing.source / "s1" / "segmentations" / "hepar.nii.gz", 1)
    (question,) = importing.plan().questions
    assert "'hepar'" in str(question)
    importing.run(Options(mapping=("hepar=liver",)))
    assert importing.final("s1")[:2] == [1, 0]


def test_values_that_were_scaled_are_rounded_and_interpolated_ones_refused(importing):
    fill(importing)
    label(importing.source / "labels" / "a1.nii.gz", 0.99609375)
    label(importing.source / "labels" / "a2.nii.gz", 0.5)
    done = importing.run()
    assert [d.label for d in done] == ["written", "written", "failed"]
    assert importing.final("a1")[:2] == [1, 0]
    assert "interpolation" in done[2].notes[0]


@pytest.mark.parametrize("text", ["255", "=1", "255=spleen", "255=3"])
def test_a_mapping_that_cannot_be_used_is_refused(importing, text):
    fill(importing)
    with pytest.raises(BadSettingsError, match="expected VALUE=LABEL or NAME=LABEL"):
        importing.plan(Options(mapping=(text,)))


def test_the_studies_folder_is_not_imported_into_itself(importing):
    scan(importing.source / "a.nii.gz")
    shutil.copytree(importing.source, importing.studies)
    importing.source = importing.studies
    with pytest.raises(BadSettingsError, match="the studies folder itself"):
        importing.plan()


def test_dicom_is_written_with_exact_values_and_places(importing):
    slices = make_series(6)
    write_series(importing.source / "x", slices)
    label(importing.source / "x" / "liver.nii.gz", 1)
    done = importing.run()[0]
    assert done.label == "failed"  # it has the grid of another scan
    volume = read_image(importing.studies / f"{done.case}.nii.gz")
    np.testing.assert_array_equal(volume.array[:, :, 3], slices[3].pixel_array.T - 1024.0)
    np.testing.assert_allclose(volume.spacing, (1.25, 1.5, 3.0), rtol=1e-6)
    assert volume.array.shape != SHAPE
