"""patients.csv, as people and their programs write it."""

import pytest

from aslseg.cases.patients import read_patients
from aslseg.errors import BadSettingsError

KNOWN = ["a", "b", "c.1.2", "Läsion"]
PATIENTS = {"a": "Müller", "b": "Müller", "c.1.2": "Li"}
ROWS = ["case,patient,role", "a,Müller,train", "b,Müller,", "c.1.2,Li,validation"]


def read(path, raw):
    (path / "patients.csv").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return read_patients(path / "patients.csv", KNOWN)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_separators_and_line_ends(tmp_path, encoding, separator, end):
    text = (end.join(ROWS) + end).replace(",", separator)
    found = read(tmp_path, text.encode(encoding))
    assert found.patients == PATIENTS
    assert found.roles == {"Müller": "train", "Li": "validation"}
    assert found.problems == []


@pytest.mark.parametrize(
    "text",
    [
        "Case,PATIENT,Role\na,Müller,Train\nb,Müller,\nc.1.2,Li,VALIDATION\n",
        "sep=;\ncase;patient;role\na;Müller;train\nb;Müller;\nc.1.2;Li;validation\n",
        "\n\ncase,patient,role\n\na,Müller,train\n,,\nb,Müller,\n   \nc.1.2,Li,validation\n\n\n",
        '"case","patient","role"\n"a","Müller","train"\n"b","Müller",""\n"c.1.2","Li","validation"',
        "age,patient,case,role\n44,Müller,a,train\n,Müller,b,\n1,Li,c.1.2,validation\n",
        "case , patient , role\n a , Müller , train\n b , Müller , \nc.1.2, Li , validation\n",
        "case,patient,role\na.nii.gz,Müller,train\nB,Müller,\nc.1.2.nrrd,Li,validation\n",
        "case,patient,role\na,Müller,train\nb,Mu\u0308ller\nc.1.2,Li,validation\n",
    ],
    ids=["capitals", "sep", "blank", "quoted", "columns", "spaces", "extensions", "unicode forms"],
)
def test_the_ways_of_spreadsheets(tmp_path, text):
    found = read(tmp_path, text)
    assert found.patients == PATIENTS
    assert found.roles == {"Müller": "train", "Li": "validation"}


def test_a_separator_inside_quotes(tmp_path):
    assert read(tmp_path, 'case,patient\na,"Müller, Hans"\n').patients == {"a": "Müller, Hans"}


def test_case_ids_in_another_unicode_form(tmp_path):
    assert read(tmp_path, "case,patient\nLa\u0308sion,P1\n").patients == {"Läsion": "P1"}


def test_lines_about_scans_that_are_not_there_are_reported(tmp_path):
    found = read(tmp_path, "case,patient\na,P1\nz,P1\n")
    assert found.patients == {"a": "P1"}
    assert found.problems == ["patients.csv: line 3: no scan 'z' in the folder"]


def test_intensities_that_a_person_has_confirmed(tmp_path):
    assert read(tmp_path, "case,patient,intensities\na,P1,confirmed\nb,P1,\n").confirmed == {"a"}


def test_no_table(tmp_path):
    assert read_patients(tmp_path / "patients.csv", KNOWN).patients == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,person\na,P1\n", "line 1: columns 'id', 'person'; expected case,patient"),
        ("a,P1\nb,P1\n", "line 1: columns 'a', 'P1'"),
        ("", "empty; expected the columns"),
        ("\n \n", "empty; expected the columns"),
        ("case,patient\n\na,\n", "line 3: no patient for 'a'"),
        ("case,patient\na\n", "line 2: no patient for 'a'"),
        ("case,patient,role\na,P1,judge\n", "line 2: role 'judge'; expected train"),
        ("case,patient,role\na,P1,train\nb,P1,validation\n", "line 3: patient 'P1' has two roles"),
        ("case,patient\na,P1\na,P2\n", "line 3: 'a' is also given to patient 'P1'"),
        ("case,patient,intensities\na,P1,maybe\n", "line 2: intensities 'maybe'; expected confirmed"),
        ('case,patient\na,"P1\nb,P2\n', r"line \d: unexpected end of data; correct its quotes"),
        (b"case,patient\na,\x81\x8d\n", "line 2: characters of no known encoding"),
    ],
)
def test_what_cannot_be_understood_stops_with_its_line(tmp_path, text, message):
    with pytest.raises(BadSettingsError, match=rf"patients\.csv: {message}"):
        read(tmp_path, text)
