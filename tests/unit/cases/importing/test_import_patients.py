"""Patients keep together, and nobody is named."""

from __future__ import annotations

import csv
import os

import pytest

from aslseg.cases.importing.patients import Pseudonyms, add_patient, safe_name
from aslseg.cases.importing.plan import Options
from aslseg.cases.patients import read_patients as read_table
from aslseg.cases.studies import read_studies
from aslseg.errors import BadSettingsError
from aslseg.serving.http_errors import safe_name as server_name
from foreign_folders import scan
from synthetic_dicom import make_series, write_series


def read_patients(folder):
    with (folder / "patients.csv").open(newline="") as file:
        return {row["case"]: row["patient"] for row in csv.DictReader(file)}


def series_of(importing, *patients):
    for n, patient in enumerate(patients):
        write_series(importing.source / f"s{n}", make_series(4, PatientID=patient, PatientName="Doe^Jane"))


def test_series_of_one_patient_have_one_pseudonym(importing):
    series_of(importing, "123456", "123456", "7")
    importing.run()
    assert len(set(read_patients(importing.studies).values())) == 2
    assert read_studies(importing.studies).problems == ()


def test_neither_name_nor_identifier_is_written(importing, listing):
    series_of(importing, "ID123456")
    importing.run()
    for name, (_, content) in listing(importing.studies).items():
        for word in ("ID123456", "Doe", "Jane"):
            assert word not in name
            assert word.encode() not in content


def test_pseudonyms_are_stable_in_a_folder_and_differ_between_folders(tmp_path):
    first = Pseudonyms(tmp_path / "a")
    first.save()
    again, other = Pseudonyms(tmp_path / "a"), Pseudonyms(tmp_path / "b")
    assert first.patient("1") == again.patient("1") != first.patient("2")
    assert first.patient("1") != other.patient("1")
    assert first.case("p", "1.2") != first.case("p", "1.3")
    assert os.stat(tmp_path / "a" / "pseudonym.key").st_mode & 0o777 == 0o600


def test_a_damaged_key_is_refused(tmp_path):
    (tmp_path / "pseudonym.key").write_text("no key")
    with pytest.raises(BadSettingsError, match=r"pseudonym\.key"):
        Pseudonyms(tmp_path)


def test_keep_ids_keeps_the_identifier(importing):
    series_of(importing, "ID 7/3")
    importing.run(Options(keep_ids=True))
    ((case, patient),) = read_patients(importing.studies).items()
    assert patient == "ID_7_3"
    assert case.startswith("ID_7_3_")


def test_without_an_identifier_the_series_of_a_study_are_one_patient(importing):
    first = make_series(4, PatientID="")
    second = make_series(4, PatientID="", StudyInstanceUID=first[0].StudyInstanceUID)
    third = make_series(4, PatientID="")
    for n, slices in enumerate((first, second, third)):
        write_series(importing.source / str(n), slices)
    importing.run()
    assert len(set(read_patients(importing.studies).values())) == 2


def test_subjects_of_bids_are_patients(importing):
    for session in "ab":
        name = f"sub-01_ses-{session}_ct.nii.gz"
        scan(importing.source / "sub-01" / f"ses-{session}" / "ct" / name, ord(session))
    importing.run()
    assert read_patients(importing.studies) == {"sub-01_ses-a": "sub-01", "sub-01_ses-b": "sub-01"}


def test_patients_csv_of_the_source_comes_along(importing):
    scan(importing.source / "a 1.nii.gz")
    (importing.source / "patients.csv").write_text("case,patient,ml\na 1,p7,3\n")
    importing.run()
    assert read_patients(importing.studies) == {"a_1": "p7"}


def test_lines_that_are_there_stay(tmp_path):
    (tmp_path / "patients.csv").write_text("patient,case,role\nme,a,validation\n")
    assert not add_patient(tmp_path, "a", "other")
    add_patient(tmp_path, "b", "p, 2")
    assert (tmp_path / "patients.csv").read_text() == 'patient,case,role\nme,a,validation\n"p, 2",b,\n'


def test_a_table_that_excel_wrote_goes_on_as_it_is(tmp_path):
    path = tmp_path / "patients.csv"
    path.write_bytes("Case;Patient\r\na;Müller\r\n".encode("cp1252"))
    for _ in range(2):
        add_patient(tmp_path, "b", "p2")
    assert read_table(path, ["a", "b"]).patients == {"a": "Müller", "b": "p2"}


@pytest.mark.parametrize(
    "start",
    ["sep=;\ncase;patient", "\nCase;Patient", "sep=;\r\n\r\ncase;patient;;", '"case"; "patient"', "\u200bcase;patient"],
)
def test_each_header_that_rounds_can_read_goes_on(tmp_path, start):
    path = tmp_path / "patients.csv"
    path.write_text(f"{start}\na;p1\n", encoding="utf-8", newline="")
    add_patient(tmp_path, "b", "p2", "validation")
    found = read_table(path, ["a", "b"])
    assert (found.patients, found.roles) == ({"a": "p1", "b": "p2"}, {"p2": "validation"})


def test_roles_and_confirmations_of_the_source_come_along(importing):
    for n, name in enumerate("abc"):
        scan(importing.source / f"{name} 1.nii.gz", n)
    table = "case,patient,role,intensities\na 1,A,,\nb 1,B,validation,\nc 1,C,train,confirmed\nd,D,,\n"
    (importing.source / "patients.csv").write_text(table)
    assert importing.plan().passed_over == ["patients.csv: line 5: no scan 'd' in the folder"]
    assert [d.notes for d in importing.run()] == [[]] * 3
    found = read_studies(importing.studies)
    assert found.problems == ()
    written = read_table(importing.studies / "patients.csv", ["a_1", "b_1", "c_1"])
    assert written.patients == {"a_1": "A", "b_1": "B", "c_1": "C"}
    assert written.roles == {"B": "validation", "C": "train"}
    assert written.confirmed == {"c_1"}


def test_a_role_that_a_line_already_there_lacks_is_said(importing):
    scan(importing.source / "a.nii.gz")
    (importing.source / "patients.csv").write_text("case,patient,role,intensities\na,A,validation,confirmed\n")
    importing.studies.mkdir()
    (importing.studies / "patients.csv").write_text("case,patient\na,A\n")
    (note,) = importing.run()[0].notes
    assert "without role validation and intensities confirmed of the source" in note
    assert (importing.studies / "patients.csv").read_text() == "case,patient\na,A\n"


@pytest.mark.parametrize(
    ("there", "reason"),
    [("case,patient,role\na,P,train\n", "patient 'P' has two roles"), ("case,patient\na,A,old\n", "role 'old'")],
)
def test_a_role_that_does_not_fit_the_table_refuses_its_scan_and_changes_nothing(importing, there, reason):
    scan(importing.studies / "a.nii.gz")
    (importing.studies / "patients.csv").write_text(there)
    scan(importing.source / "b.nii.gz", 1)
    (importing.source / "patients.csv").write_text("case,patient,role\nb,P,validation\n")
    (done,) = importing.run()
    assert done.scan == "failed"
    assert reason in done.notes[0]
    assert (importing.studies / "patients.csv").read_text() == there
    assert not (importing.studies / "b.nii.gz").exists()


def test_a_table_without_the_columns_is_refused(tmp_path):
    (tmp_path / "patients.csv").write_text("scan;person\na;b\n")
    with pytest.raises(BadSettingsError, match=r"expected case,patient\[,role\]"):
        add_patient(tmp_path, "a", "p")


@pytest.mark.parametrize(
    ("name", "safe"), [("a b", "a_b"), ("../x", "x"), ("-a.", "a"), ("ok-1.2_3", "ok-1.2_3"), ("a" * 100, "a" * 100)]
)
def test_safe_names(name, safe):
    assert safe_name(name) == safe


def test_names_of_which_little_is_left_stay_different_and_are_allowed_by_the_server():
    names = ["Иванов-1", "Петров-1", "张三", "李四", "é1", "1", "", "---", "_", "\udcff", "a" * 101, "a" * 102]
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert [server_name(name, "image id") for name in safe] == safe
    assert safe_name("é") == safe_name("e\u0301")


def test_keep_ids_keeps_apart_patients_whose_names_are_not_in_ascii(importing):
    for n, patient in enumerate(("张三", "张三", "李四", "Иванов-1", "Петров-1")):
        slices = make_series(4, PatientID=patient, SpecificCharacterSet="ISO_IR 192")
        write_series(importing.source / str(n), slices)
    importing.run(Options(keep_ids=True))
    found = read_patients(importing.studies)
    assert len(found) == 5
    assert len(set(found.values())) == 4
    assert all(server_name(case, "image id").startswith(patient) for case, patient in found.items())


def test_files_whose_names_are_not_in_ascii_are_two_scans_that_are_seen(importing):
    for n, name in enumerate(("张三", "李四")):
        scan(importing.source / f"{name}.nii.gz", n)
    importing.run()
    assert len(read_studies(importing.studies).images) == 2
