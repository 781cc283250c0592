import numpy as np
import pytest

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO, read_studies
from aslseg.errors import NotEnoughCasesError
from aslseg.volume.io import write_label


@pytest.fixture
def root(tmp_path):
    for name in ("b.nii.gz", "a.nrrd", "c.1.2.nii"):
        (tmp_path / name).write_bytes(b"scan")
    (tmp_path / "labels" / FINAL).mkdir(parents=True)
    (tmp_path / "labels" / FINAL / "b.nii.gz").write_bytes(b"label")
    return tmp_path


def csv(root, text, encoding="utf-8"):
    (root / "patients.csv").write_text(text, encoding=encoding)
    return read_studies(root)


def test_scans_and_human_labels(root):
    studies = read_studies(root)
    assert list(studies.images) == ["a", "b", "c.1.2"]
    assert studies.final == {"b": root / "labels" / FINAL / "b.nii.gz"}
    assert studies.patients == {"a": "a", "b": "b", "c.1.2": "c.1.2"}
    assert studies.problems == ()


def test_only_human_labels_are_labels(root):
    for tag in (ORIGINAL, PSEUDO):
        write_label(root / "labels" / tag / "a.nii.gz", np.zeros((2, 2, 2)), np.eye(4))
    assert list(read_studies(root).final) == ["b"]


def test_what_is_no_scan_is_passed_over(root):
    for name in (".hidden.nii.gz", "._a.nii.gz", "notes.txt", "datastore_v2.json"):
        (root / name).write_bytes(b"x")
    (root / "folder.nii.gz").mkdir()
    assert list(read_studies(root).images) == ["a", "b", "c.1.2"]


def test_two_scans_of_one_name(root):
    (root / "a.nii.gz").write_bytes(b"scan")
    studies = read_studies(root)
    assert studies.images["a"].name == "a.nii.gz"
    assert studies.problems == ("a.nrrd: a.nii.gz has the same id; keep one of them",)


def test_label_without_a_scan(root):
    (root / "labels" / FINAL / "z.nii.gz").write_bytes(b"label")
    studies = read_studies(root)
    assert list(studies.final) == ["b"]
    assert studies.problems == ("labels/final/z.nii.gz: no scan 'z' in the folder",)


def test_label_path(root):
    assert read_studies(root).label_path(PSEUDO, "a") == root / "labels" / "aslseg_pseudo" / "a.nii.gz"


def test_patients_and_roles(root):
    # as a spreadsheet writes it, with a byte order mark
    studies = csv(root, "case,patient,role\na,P1,train\nb,P1,\nc.1.2,P2,validation\n", "utf-8-sig")
    assert studies.patients == {"a": "P1", "b": "P1", "c.1.2": "P2"}
    assert studies.fixed_roles == {"P1": "train", "P2": "validation"}
    assert studies.problems == ()


def test_patients_without_roles(root):
    studies = csv(root, "patient,case\nP1,a\n")
    assert studies.patients["a"] == "P1"
    assert studies.fixed_roles == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id,person\na,P1\n", "expected the columns case,patient"),
        ("", "expected the columns case,patient"),
        ("case,patient\nz,P1\n", "line 2: no scan 'z'"),
        ("case,patient\na,\n", "line 2: no scan 'a' or empty patient"),
        ("case,patient\na\n", "line 2"),
        ("case,patient,role\na,P1,judge\n", "role 'judge'; expected train or validation"),
        ("case,patient,role\na,P1,train\nb,P1,validation\n", "patient 'P1' has two roles; kept 'train'"),
    ],
)
def test_mistakes_in_the_table_are_told(root, text, problem):
    (found,) = csv(root, text).problems
    assert problem in found


def test_no_folder_and_no_scans(tmp_path):
    with pytest.raises(NotEnoughCasesError, match="no such folder"):
        read_studies(tmp_path / "absent")
    with pytest.raises(NotEnoughCasesError, match="no scans"):
        read_studies(tmp_path)
