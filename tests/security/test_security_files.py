"""A file that somebody sends cannot make the server read another one, nor fill its memory."""

import gzip
import resource
import subprocess
import sys
import time
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from aslseg.errors import BadImageError, BadLabelError
from aslseg.serving.labels import decode_label
from aslseg.types import Labels, Volume
from aslseg.volume import untrusted
from aslseg.volume.fork_server import ForkServer
from aslseg.volume.io import read_image, read_label
from aslseg.volume.untrusted import Limits, check_untrusted, read_untrusted, read_untrusted_label

SCAN = Volume(np.zeros((2, 2, 2), np.float32), np.eye(4))
LABELS = Labels.parse("liver")
NRRD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"
META = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"

# each names SECRET, in the words of a reader that takes more for a line end, a field or a path than ours does
DETACHED = [
    *("data file: SECRET\n", "datafile: SECRET\n", "Data File: SECRET\n", "DATAFILE:SECRET\n", "data  file: SECRET\n"),
    *(
        "data file: LIST\nSECRET\n",
        "data file: LIST 2\nSECRET\n",
        "data file: SECRET%d 1 1 1\n",
        "data file: ./SECRET\n",
    ),
    *("content: x\rdata file: SECRET\n", "content: x\r\rdata file: SECRET\r\n", "# x\rdata file: SECRET\n"),
    *("key:=x\rdata file: SECRET\n", "content: x\x0bdata file: SECRET\n", "content: x\x00data file: SECRET\n"),
    *("\tdata file: SECRET\n", "data file : SECRET\n", "no field\n"),
]
META_DETACHED = [
    *(
        "ElementDataFile = SECRET\n",
        "ElementDataFile: SECRET\n",
        "  ElementDataFile=SECRET\n",
        "ElementDataFile = LIST\nSECRET\n",
    ),
    *("ElementDataFile = ./SECRET\n", "ElementDataFile = SECRET%d 1 1 1\n", "elementdatafile = SECRET\n"),
    *("Comment = x\rElementDataFile = SECRET\n", "Comment = x\x00\nElementDataFile = SECRET\n"),
    *("CompressedData = True\nElementDataFile = SECRET\n", "ElementDataFile = SECRET\nElementDataFile = LOCAL\n"),
]


@pytest.mark.parametrize("name", ["a.nrrd", "a.seg.nrrd", "a.mha", "a.mhd", "a.nii", "a.nii.gz"])
@pytest.mark.parametrize("absolute", [True, False])
def test_no_header_makes_us_open_another_file(tmp_path, name, absolute):
    secret = tmp_path / "secret"
    secret.write_bytes(b"passwords")
    opened = []
    sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
    headers = [META + line for line in META_DETACHED] if name.startswith("a.m") else [NRRD + line for line in DETACHED]
    for header in headers:
        for end in ("", "\n\n12345678"):
            text = header.replace("SECRET", str(secret) if absolute else "secret") + end
            (tmp_path / name).write_bytes(text.encode("latin-1"))
            for read in (lambda p: read_image(p), lambda p: read_label(p, SCAN, LABELS)):
                with pytest.raises((BadImageError, BadLabelError)) as refusal:
                    read(tmp_path / name)
                for byte in b"passwords":
                    assert f"{byte}.0" not in str(refusal.value)
                assert "password" not in str(refusal.value).replace(str(secret), "")
    assert [p for p in opened if p.rsplit("/", 1)[-1].startswith("secret")] == []


def test_voxels_beside_a_header_are_for_the_admins_own_scans(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((2, 3, 4), np.int16)), str(tmp_path / "a.mhd"))
    assert read_image(tmp_path / "a.mhd").array.all()
    with pytest.raises(BadImageError, match=r"its voxels lie in another file \('a.raw'\)"):
        read_untrusted(tmp_path / "a.mhd", Limits(1e6))
    (tmp_path / "a.raw").rename(tmp_path / "b.raw")
    (tmp_path / "a.raw").symlink_to(tmp_path / "b.raw")
    with pytest.raises(BadImageError, match="behind a link"):
        read_image(tmp_path / "a.mhd")


def test_label_values_that_could_be_bytes_of_anything_are_counted_not_shown(tmp_path):
    array = np.zeros((2, 2, 2), np.float32)
    array[0, 0] = 1.2345e30, -1.2345e-30
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "l.nii")
    with pytest.raises(BadLabelError) as refusal:
        read_label(tmp_path / "l.nii", SCAN, LABELS)
    assert "1.2345" not in str(refusal.value)


@pytest.mark.parametrize("named", [False, True])
def test_an_answer_repeats_no_voxel_of_an_upload(tmp_path, named):
    """Small whole numbers can be labels, and letters: once a header led to another file, they came out one by one."""
    array = np.zeros((2, 2, 2), np.uint8)
    array[0, 0] = 114, 111
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "l.nii")
    info = [{"name": "liver", "idx": 1}] if named else None
    with pytest.raises(BadLabelError, match="values of its voxels") as refusal:
        decode_label(tmp_path / "l.nii", SCAN, info, LABELS)
    assert "114" not in str(refusal.value)
    assert "111" not in str(refusal.value)
    with pytest.raises(BadLabelError, match=r"values \[111, 114\]"):
        read_label(tmp_path / "l.nii", SCAN, LABELS)


# --- bombs


def bomb(path, claimed, real):
    """A file whose header claims one number of voxels and whose stream inflates to another; a few kilobytes long."""
    side = round(claimed ** (1 / 3))
    packer = zlib.compressobj(9, wbits=31 if path.name.endswith(("gz", "nrrd")) else 15)
    header = b""
    if path.name.endswith("gz"):
        image = nib.Nifti1Header()
        image.set_data_shape((side,) * 3)
        image.set_data_dtype(np.uint8)
        image["vox_offset"], image["magic"] = 352, b"n+1"
        packed = packer.compress(image.binaryblock + b"\0" * 4)
    elif path.name.endswith("nrrd"):
        header = f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {side} {side} {side}\nencoding: gzip\n\n".encode()
        packed = b""
    else:
        header = (
            f"ObjectType = Image\nNDims = 3\nDimSize = {side} {side} {side}\nCompressedData = True\n"
            "ElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
        ).encode()
        packed = b""
    block = bytes(1 << 20)
    packed += b"".join(packer.compress(block) for _ in range(real >> 20)) + packer.flush()
    path.write_bytes(header + packed)
    return path


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_size_above_the_limit_is_refused_before_anything_is_inflated(tmp_path, monkeypatch, name):
    path = bomb(tmp_path / name, 512**3, 1 << 27)
    assert path.stat().st_size < 200_000
    for read in (lambda: read_image(path, 1e7), lambda: read_untrusted(path, Limits(1e7))):
        with pytest.raises(BadImageError, match=r"1\.34e\+08 voxels, more than max_(upload_)?voxels = 1e\+07"):
            read()


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_stream_that_goes_on_is_read_to_the_declared_size_only(tmp_path, name):
    path = bomb(tmp_path / name, 64**3, 1 << 28)
    code = (
        "import resource, sys; from pathlib import Path; from aslseg.volume.io import read_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"assert read_image(Path({str(path)!r})).array.shape == (64,) * 3\n"
        "sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 64_000)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(tmp_path, monkeypatch):
    path = bomb(tmp_path / "a.nii.gz", 512**3, 1 << 20)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    monkeypatch.setattr(untrusted, "_readers", own := ForkServer("aslseg.volume.untrusted"))
    with pytest.raises(BadImageError, match="cannot be read as an image"):
        read_untrusted(path, Limits(2e8))
    own.stop()  # what it and its children have used counts now
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - before < 100_000


def test_the_memory_of_the_child_is_limited_and_comes_back(tmp_path, monkeypatch):
    path = bomb(tmp_path / "a.nrrd", 512**3, 1 << 27)
    monkeypatch.setattr(untrusted, "BYTES_PER_VOXEL", 0)
    monkeypatch.setattr(untrusted, "INTERPRETER_BYTES", 2e8)
    with pytest.raises(BadImageError, match="not enough memory to read it"):
        read_untrusted(path, Limits(2e8))


def test_a_child_that_dies_costs_the_upload_only(tmp_path, monkeypatch):
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    monkeypatch.setattr(untrusted, "_readers", ForkServer("aslseg.absent"))
    with pytest.raises(BadImageError, match=r"a\.nii\.gz: .* limits of an upload \(exit code 1\)"):
        read_untrusted(tmp_path / "a.nii.gz", Limits(1))


def test_a_child_that_takes_too_long_is_ended(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    started = time.monotonic()
    with pytest.raises(BadImageError, match=r"limits of an upload \(more than 0\.01 s\)"):
        read_untrusted(tmp_path / "a.nii.gz", Limits(1e6, seconds=0.01))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_an_honest_upload_is_read_as_a_file_of_ours(tmp_path, name):
    array = np.random.default_rng(0).integers(-200, 300, (6, 5, 4)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
    ours, theirs = read_image(tmp_path / name), read_untrusted(tmp_path / name, Limits(1e6))
    assert theirs.array.dtype == np.float32
    assert np.array_equal(ours.array, theirs.array)
    assert np.array_equal(ours.affine, theirs.affine)
    check_untrusted(tmp_path / name, Limits(1e6))


def test_errors_of_the_child_are_those_of_the_readers(tmp_path):
    with pytest.raises(BadImageError, match="no such file"):
        read_untrusted(tmp_path / "a.nii.gz", Limits(1e6))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(b"text" * 200))
    with pytest.raises(BadLabelError, match=r"b\.nii\.gz: cannot be read"):
        read_untrusted_label(tmp_path / "b.nii.gz", Limits(1e6))
    nib.save(nib.Nifti1Image(np.full((3, 3, 3), np.nan, np.float32), np.eye(4)), tmp_path / "c.nii")
    with pytest.raises(BadImageError, match="27 voxels are NaN"):
        read_untrusted(tmp_path / "c.nii", Limits(1e6))
