import errno
import gzip
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from aslseg.errors import BadImageError, BadLabelError, DiskFullError
from aslseg.types import Labels, Volume
from aslseg.volume import io
from aslseg.volume.io import case_id, extension, read_image, read_label, require_free_disk, write_image, write_label

LABELS = Labels.parse("liver,tumour", "tumour:liver")
AFFINE = np.array([[-1.0, 0, 0, 40], [0, 1.5, 0, -20], [0, 0, 3, 7], [0, 0, 0, 1]])
ARRAY = np.random.default_rng(0).integers(-200, 300, (6, 5, 4)).astype(np.float32)
SCAN = Volume(ARRAY, AFFINE)


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_round_trip(tmp_path, name):
    write_image(tmp_path / name, SCAN)
    found = read_image(tmp_path / name)
    assert found.array.dtype == np.float32
    assert np.array_equal(found.array, ARRAY)
    assert np.allclose(found.affine, AFFINE)
    assert found.spacing == pytest.approx((1, 1.5, 3))
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mhd", "a.nii.gz"])
def test_itk_formats_mean_the_same_place(tmp_path, name):
    write_image(tmp_path / "reference.nii.gz", SCAN)
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "reference.nii.gz")), str(tmp_path / name))
    found = read_image(tmp_path / name)
    assert np.array_equal(found.array, ARRAY)
    assert np.allclose(found.affine, AFFINE, atol=1e-5)


def test_our_files_have_the_place_that_itk_reads(tmp_path):
    write_label(tmp_path / "a.nii.gz", np.zeros((6, 5, 4)), AFFINE)
    write_image(tmp_path / "b.nii.gz", SCAN)
    for name in ("a.nii.gz", "b.nii.gz"):
        image = sitk.ReadImage(str(tmp_path / name))
        assert image.TransformIndexToPhysicalPoint((1, 2, 3)) == pytest.approx((-39, 17, 16))


def test_same_content_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / name / "x.nii.gz", SCAN)
        write_label(tmp_path / name / "y.nii.gz", ARRAY > 0, AFFINE)
    for name in ("x.nii.gz", "y.nii.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_names():
    from pathlib import Path

    assert case_id(Path("/x/1.2.840.nii.gz")) == "1.2.840"
    assert case_id(Path("liver.seg.nrrd")) == "liver"
    assert extension(Path("A.NII.GZ")) == ".nii.gz"
    assert extension(Path("._case.nii.gz")) is None
    assert extension(Path("notes.txt")) is None


def test_trailing_axes_of_length_one_are_dropped(tmp_path):
    path = save(tmp_path / "a.nii.gz", ARRAY[..., None, None].astype(np.int16))
    assert np.array_equal(read_image(path).array, ARRAY)


def test_a_scan_in_memory_is_no_view_of_its_file(tmp_path):
    path = tmp_path / "scan.nii"
    save(path, np.ones((4, 5, 6), np.float32))
    scan = read_image(path)
    save(path, np.zeros((4, 5, 6), np.float32))
    assert scan.array.all()


def test_scaled_integers_are_read_as_what_they_mean(tmp_path):
    image = nib.Nifti1Image(np.full((3, 3, 3), 100, np.int16), AFFINE)
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    stored = np.frombuffer(raw[352:354], np.int16)[0] * 0.5 - 10
    assert read_image(tmp_path / "a.nii").array.max() == pytest.approx(stored)


@pytest.mark.parametrize("share", [0, 0.05, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
def test_truncated_files_are_named(tmp_path, name, share):
    write_image(tmp_path / "whole.nii.gz", SCAN)
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "whole.nii.gz")), str(tmp_path / name))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(BadImageError, match=name):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_something_else_under_an_image_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>login please</html>" * 50)
    with pytest.raises(BadImageError, match=r"not an image.*again, or remove it"):
        read_image(tmp_path / name)


def test_text_in_a_gzip_is_no_image(tmp_path):
    with gzip.open(tmp_path / "a.nii.gz", "wb") as file:
        file.write(b"text" * 200)
    with pytest.raises(BadImageError, match=r"a\.nii\.gz"):
        read_image(tmp_path / "a.nii.gz")


def test_absent_or_wrong_kind_of_file(tmp_path):
    with pytest.raises(BadImageError, match="no such file"):
        read_image(tmp_path / "a.nii.gz")
    with pytest.raises(BadImageError, match="expected one of"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(tmp_path, value):
    array = ARRAY.copy()
    array[0, 0, :2] = value
    with pytest.raises(BadImageError, match=r"a\.nii\.gz: 2 voxels are NaN or infinite"):
        read_image(save(tmp_path / "a.nii.gz", array))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4, 2), (6,), (2, 2, 2, 1, 3)])
def test_other_than_three_axes(tmp_path, shape):
    with pytest.raises(BadImageError, match="expected one 3-D volume"):
        read_image(save(tmp_path / "a.nii", np.zeros(shape, np.int16)))


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_voxels_that_are_not_real(tmp_path, dtype):
    with pytest.raises(BadImageError, match="real numbers"):
        read_image(save(tmp_path / "a.nii", np.zeros((3, 3, 3), dtype)))


def test_vector_images(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 3, 3, 2), np.float32), isVector=True), str(tmp_path / "a.mha"))
    with pytest.raises(BadImageError, match="2 components"):
        read_image(tmp_path / "a.mha")


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.nrrd", "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: {}\n"),
        ("a.nrrd", "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndatafile: {}\n\nx"),
        (
            "a.seg.nrrd",
            "NRRD0004\r\ntype: uint8\r\ndimension: 3\r\nsizes: 2 2 2\r\nencoding: raw\r\nDATA FILE: LIST\r\n{}",
        ),
        ("a.mha", "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = {}\n"),
        ("a.mhd", "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = {}\n"),
        ("a.mhd", "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LIST\n{}\n"),
        ("a.mhd", "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile : ../x.raw\n{}\n"),
    ],
)
def test_voxels_are_never_fetched_from_another_file(tmp_path, name, header):
    secret = tmp_path / "secret"
    secret.write_bytes(b"password")
    (tmp_path / name).write_bytes(header.format(secret).encode())
    with pytest.raises(BadImageError, match="its voxels lie in another file"):
        read_image(tmp_path / name)


def test_size_is_refused_before_anything_is_read(tmp_path):
    path = save(tmp_path / "a.nii", ARRAY)
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(raw)
    with pytest.raises(BadImageError, match=r"3\.52e\+13 voxels, more than max_voxels"):
        read_image(path)
    with pytest.raises(BadImageError, match="max_voxels = 100"):
        read_image(save(tmp_path / "b.nii", ARRAY), max_voxels=100)


@pytest.mark.parametrize("dims", [(0, 5, 4), (-3, 5, 4)])
def test_sizes_that_cannot_be(tmp_path, dims):
    path = save(tmp_path / "a.nii", ARRAY)
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array(dims, "<i2").tobytes()
    path.write_bytes(raw)
    with pytest.raises(BadImageError, match=r"a\.nii"):
        read_image(path)


@pytest.mark.parametrize(
    "matrix",
    [
        np.diag([1e-6, 1, 1]),
        np.diag([1.0, 200, 1]),
        np.array([[1.0, 1, 0], [0, 1e-3, 0], [0, 0, 1]]),
        np.full((3, 3), np.nan),
    ],
    ids=["tiny", "huge", "collapsed", "nan"],
)
def test_impossible_geometry(tmp_path, matrix):
    path = save(tmp_path / "a.nii", ARRAY)
    raw = bytearray(path.read_bytes())
    rows = np.zeros((3, 4), "<f4")
    rows[:, :3] = matrix
    raw[280:328] = rows.tobytes()
    raw[80:92] = np.linalg.norm(matrix, axis=0).astype("<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(BadImageError, match="impossible geometry"):
        read_image(path)


def test_label_round_trip(tmp_path):
    label = np.random.default_rng(0).integers(0, 3, ARRAY.shape).astype(np.uint8)
    write_label(tmp_path / "l.nii.gz", label, AFFINE)
    found = read_label(tmp_path / "l.nii.gz", SCAN, LABELS)
    assert found.dtype == np.uint8
    assert np.array_equal(found, label)


def test_label_of_another_shape(tmp_path):
    write_label(tmp_path / "l.nii.gz", np.zeros((6, 5, 3)), AFFINE)
    with pytest.raises(BadLabelError, match=r"l\.nii\.gz: shape \(6, 5, 3\), but its scan has \(6, 5, 4\)"):
        read_label(tmp_path / "l.nii.gz", SCAN, LABELS)


def test_label_in_another_place(tmp_path):
    moved = AFFINE.copy()
    moved[2, 3] += 3
    write_label(tmp_path / "l.nii.gz", np.zeros(ARRAY.shape), moved)
    with pytest.raises(BadLabelError, match=r"up to 3\.0 mm away"):
        read_label(tmp_path / "l.nii.gz", SCAN, LABELS)
    flipped = AFFINE @ np.diag([-1.0, 1, 1, 1])
    write_label(tmp_path / "l.nii.gz", np.zeros(ARRAY.shape), flipped)
    with pytest.raises(BadLabelError, match="away from its scan"):
        read_label(tmp_path / "l.nii.gz", SCAN, LABELS)


def test_rounding_of_the_header_is_forgiven(tmp_path):
    write_label(tmp_path / "l.nii.gz", np.zeros(ARRAY.shape), AFFINE + 0.002 * (AFFINE != 0))
    assert read_label(tmp_path / "l.nii.gz", SCAN, LABELS).max() == 0


@pytest.mark.parametrize("value", [3, 255, -1, 0.5])
def test_label_values_outside_the_labels(tmp_path, value):
    array = np.zeros(ARRAY.shape, np.float32)
    array[0, 0, 0] = value
    with pytest.raises(BadLabelError, match=r"not among 0\.\.2 \(liver, tumour\)"):
        read_label(save(tmp_path / "l.nii.gz", array), SCAN, LABELS)


def test_unreadable_label_is_a_label_error(tmp_path):
    (tmp_path / "l.nii.gz").write_bytes(b"x")
    with pytest.raises(BadLabelError, match=r"l\.nii\.gz"):
        read_label(tmp_path / "l.nii.gz", SCAN, LABELS)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_old_label(tmp_path, monkeypatch, number):
    path = tmp_path / "l.nii.gz"
    write_label(path, np.zeros((3, 3, 3)), AFFINE)
    before = path.read_bytes()

    def full(image, target):
        target.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(io.nib, "save", full)
    with pytest.raises(DiskFullError, match="free some space"):
        write_label(path, np.ones((3, 3, 3)), AFFINE)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["l.nii.gz"]


def test_other_write_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(image, target):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(io.nib, "save", broken)
    with pytest.raises(OSError, match="input/output"):
        write_label(tmp_path / "l.nii.gz", np.ones((3, 3, 3)), AFFINE)
    assert not any(tmp_path.iterdir())


def test_free_disk_is_asked_for_before_a_step(tmp_path):
    require_free_disk(tmp_path / "not" / "yet", 1e-6)
    with pytest.raises(DiskFullError, match=r"at least 1000000000\.00 GB needed \(min_free_gb\)"):
        require_free_disk(tmp_path, 1e9)
