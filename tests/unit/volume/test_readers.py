"""Our readers give what ITK gives, whatever program wrote the file."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.spatial.transform import Rotation

from aslseg.errors import BadImageError
from aslseg.volume import container
from aslseg.volume.io import read_header, read_image

ARRAY = np.random.default_rng(0).integers(0, 100, (4, 5, 6))
ITK_TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")


def as_itk(path):
    """Affine (RAS) as ITK, and so 3D Slicer, takes it."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mhd", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_itk_writes_is_read_as_itk_reads_it(tmp_path, name, packed):
    rng = np.random.default_rng(1)
    for dtype in ITK_TYPES:
        image = sitk.GetImageFromArray(ARRAY.astype(dtype))
        image.SetSpacing((1.5, 0.7, 3))
        image.SetOrigin((10, -20, 30))
        turn = Rotation.from_euler("xyz", rng.uniform(-180, 180, 3), degrees=True)
        image.SetDirection(turn.as_matrix().ravel().tolist())
        sitk.WriteImage(image, str(tmp_path / name), packed)
        found = read_image(tmp_path / name)
        assert np.array_equal(found.array, ARRAY.T.astype(np.float32))
        assert np.allclose(found.affine, as_itk(tmp_path / name), atol=1e-4)


SPACES = ("space: left-posterior-superior", "space: RAS", "space: left-anterior-superior", "space: scanner-xyz")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("encoding", ["raw", "gzip", "ascii"])
@pytest.mark.parametrize("order", ["little", "big"])
def test_nrrd_of_every_space_and_encoding(tmp_path, space, encoding, order):
    lines = [
        *(
            "NRRD0005",
            "# a comment",
            "type: short",
            "dimension: 3",
            space,
            "sizes: 4 5 6",
            "kinds: domain domain domain",
        ),
        *("space directions: (1,0,0) (0,0,-2) (0,3,0)", f"endian: {order}", f"encoding: {encoding}"),
        *("space origin: (1,2,3)", "Some_Key:=value: with = signs", "", ""),
    ]
    raw = ARRAY.astype("<i2" if order == "little" else ">i2").tobytes("F")
    if encoding == "ascii":
        raw = " ".join(str(n) for n in ARRAY.ravel("F")).encode()
    (tmp_path / "a.nrrd").write_bytes("\n".join(lines).encode() + (gzip.compress(raw) if encoding == "gzip" else raw))
    found = read_image(tmp_path / "a.nrrd")
    assert np.array_equal(found.array, ARRAY)
    assert np.allclose(found.affine, as_itk(tmp_path / "a.nrrd"))


def test_windows_line_ends(tmp_path):
    header = "NRRD0004\r\ntype: uchar\r\ndimension: 3\r\nsizes: 4 5 6\r\nspacings: 1 2 3\r\nencoding: raw\r\n\r\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + ARRAY.astype(np.uint8).tobytes("F"))
    found = read_image(tmp_path / "a.nrrd")
    assert np.array_equal(found.array, ARRAY)
    assert found.spacing == (1, 2, 3)


def test_several_gzip_members(tmp_path):
    nib.save(nib.Nifti1Image(ARRAY.astype(np.int16), np.eye(4)), tmp_path / "a.nii")
    raw = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]))
    assert np.array_equal(read_image(tmp_path / "b.nii.gz").array, ARRAY)


@pytest.mark.parametrize(("name", "really"), [("a.nii.gz", "b.nii"), ("a.nii", "b.nii.gz")])
def test_packed_or_not_whatever_the_name_says(tmp_path, name, really):
    nib.save(nib.Nifti1Image(ARRAY.astype(np.int16), np.eye(4)), tmp_path / really)
    (tmp_path / really).rename(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name).array, ARRAY)


def test_nifti_of_the_second_version(tmp_path):
    nib.save(nib.Nifti2Image(ARRAY.astype(np.int16), np.diag([1, 2, 3, 1])), tmp_path / "a.nii.gz")
    found = read_image(tmp_path / "a.nii.gz")
    assert np.array_equal(found.array, ARRAY)
    assert found.spacing == (1, 2, 3)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.mhd"])
def test_a_header_is_read_without_its_voxels(tmp_path, monkeypatch, name):
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY.astype(np.int16)), str(tmp_path / name))
    whole = read_image(tmp_path / name)

    def never(self):
        raise AssertionError("the voxels were read")

    monkeypatch.setattr(container.StoredVolume, "voxels", never)
    header = read_header(tmp_path / name)
    assert header.array.shape == whole.array.shape
    assert np.array_equal(header.affine, whole.affine)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_flipped_bit_is_found(tmp_path, name):
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.integers(0, 30000, (16, 16, 16)).astype(np.int16))
    sitk.WriteImage(image, str(tmp_path / name), True)
    raw = bytearray((tmp_path / name).read_bytes())
    raw[-5000] ^= 4
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BadImageError, match=rf"{name}: cannot be read as an image"):
        read_image(tmp_path / name)


# --- geometry: both forms of a NIfTI header, and its units

Q = np.array([[-1.5, 0, 0, 10], [0, -1.5, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1.0]])
S = np.array([[1.5, 0, 0, 11], [0, -1.5, 0, 22], [0, 0, 3, 33], [0, 0, 0, 1.0]])
TURNED = np.eye(4)
TURNED[:3, :3] = Rotation.from_euler("xyz", (20, -35, 70), degrees=True).as_matrix() * [1.5, 1.5, 3]
SHEARED = S + np.array([[0, 0.5, 0, 0], *[[0] * 4] * 3])
LARGER = S @ np.diag([2.0, 2, 2, 1])


def nifti(path, q, q_code, s, s_code, units="mm"):
    image = nib.Nifti1Image(ARRAY.astype(np.int16), None)
    image.header.set_qform(q, code=1)
    image.header.set_sform(s, code=1)
    image.header["qform_code"], image.header["sform_code"] = q_code, s_code
    image.header.set_xyzt_units(units)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("codes", list(itertools.product((0, 1, 2), (0, 1, 2, 4))))
@pytest.mark.parametrize("forms", [(Q, S), (S, S), (TURNED, Q), (Q, TURNED), (Q, SHEARED), (Q, LARGER)])
def test_both_forms_are_weighed_as_itk_does(tmp_path, codes, forms):
    path = nifti(tmp_path / "a.nii", forms[0], codes[0], forms[1], codes[1])
    if codes[0] == 0 and codes[1] and forms[1] is SHEARED:
        with pytest.raises(RuntimeError, match="orthonormal"):
            as_itk(path)
        assert any("right angles" in note for note in read_image(path).notes)
        return
    found = read_image(path)
    assert np.allclose(found.affine, as_itk(path), atol=1e-4)


@pytest.mark.parametrize(("unit", "size"), [("micron", 800.0), ("meter", 0.0015), ("unknown", 1.5)])
def test_units(tmp_path, unit, size):
    for code in (0, 1):
        scale = np.diag([size / 1.5] * 3 + [1])
        path = nifti(tmp_path / "a.nii", scale @ Q, code, scale @ Q, code, unit)
        found = read_image(path)
        assert np.allclose(found.affine, as_itk(path), atol=1e-4)
        assert any("converted to millimetres" in note for note in found.notes) == (unit != "unknown")


@pytest.mark.parametrize(
    ("codes", "forms", "note"),
    [
        ((0, 0), (Q, S), "says nothing of orientation"),
        ((1, 1), (Q, S), "places it twice, up to 3 mm apart; the sform"),
        ((1, 2), (Q, S), "places it twice, up to 3 mm apart; the qform"),
        ((0, 1), (Q, LARGER), "two voxel sizes, 3 x 3 x 6 and 1.5 x 1.5 x 3; the second"),
    ],
)
def test_what_is_unusual_is_said_once(tmp_path, caplog, codes, forms, note):
    path = nifti(tmp_path / "odd.nii", forms[0], codes[0], forms[1], codes[1])
    container.say_once.cache_clear()
    for _ in range(3):
        assert any(note in n for n in read_image(path).notes)
    assert caplog.text.count(note) == 1


def test_an_ordinary_header_needs_no_words(tmp_path):
    assert read_image(nifti(tmp_path / "a.nii", S, 1, S, 1)).notes == ()
    assert read_image(nifti(tmp_path / "b.nii", Q, 0, TURNED, 2)).notes == ()
