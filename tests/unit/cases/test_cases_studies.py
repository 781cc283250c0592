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


def test_links_to_nothing_are_named(root):
    (root / "d.nii.gz").symlink_to("/not/mounted/x.nii.gz")
    (root / "labels" / FINAL / "a.nii.gz").symlink_to("gone.nii.gz")
    studies = read_studies(root)
    assert "d" not in studies.images
    assert [p.split(";")[0] for p in studies.problems] == [
        "d.nii.gz: a link to /not/mounted/x.nii.gz, which is not there",
        "a.nii.gz: a link to gone.nii.gz, which is not there",
    ]
    for name in ("a.nrrd", "b.nii.gz", "c.1.2.nii"):
        (root / name).unlink()
    with pytest.raises(NotEnoughCasesError, match=r"d\.nii\.gz: a link to /not/mounted"):
        read_studies(root)


def test_links_to_something_are_scans(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("disk2") / "x.nii.gz"
    other.write_bytes(b"scan")
    (root / "d.nii.gz").symlink_to(other)
    assert "d" in read_studies(root).images


@pytest.mark.parametrize(
    ("name", "owner"),
    [("b_seg.nii.gz", "b"), ("b-label.nii", "b"), ("a_Mask.nrrd", "a"), ("c.1.2_segmentation.mha", "c.1.2")],
)
def test_a_segmentation_beside_its_scan_is_no_scan(root, name, owner):
    (root / name).write_bytes(b"label")
    studies = read_studies(root)
    assert list(studies.images) == ["a", "b", "c.1.2"]
    assert studies.problems == (
        f"{name}: looks like a segmentation of {owner!r}; "
        f"move it to labels/final/{owner}{name[name.index('.', len(owner)) :]}",
    )


def test_segmentations_by_extension_and_of_lits(root):
    for name in ("x.seg.nrrd", "volume-3.nii", "segmentation-3.nii", "mask_of_nothing.nii", "y_seg.nii"):
        (root / name).write_bytes(b"x")
    studies = read_studies(root)
    assert list(studies.images) == ["a", "b", "c.1.2", "mask_of_nothing", "volume-3", "y_seg"]
    assert [p.split(";")[0] for p in studies.problems] == [
        "segmentation-3.nii: looks like a segmentation of 'volume-3'",
        "x.seg.nrrd: a segmentation, not a scan",
    ]


def test_a_label_of_nearly_the_same_name(root):
    (root / "patient_007.nii").write_bytes(b"scan")
    (root / "labels" / FINAL / "patient_07.nii.gz").write_bytes(b"label")
    assert "did you mean 'patient_007'?" in read_studies(root).problems[0]


def test_scans_in_folders_below(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a.nii.gz").write_bytes(b"scan")
    with pytest.raises(NotEnoughCasesError, match="images lie in its sub-folders imagesTr"):
        read_studies(tmp_path)


def test_no_folder_and_no_scans(tmp_path):
    with pytest.raises(NotEnoughCasesError, match="no such folder"):
        read_studies(tmp_path / "absent")
    with pytest.raises(NotEnoughCasesError, match="no scans"):
        read_studies(tmp_path)
