from __future__ import annotations

import copy

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from aslseg.errors import BadImageError
from aslseg.volume.dicom_series import find_series, read_stack, stack
from aslseg.volume.io import LPS_TO_RAS
from synthetic_dicom import AXIAL, CORONAL, SHAPE, make_series, write_series


def only(folder):
    (found,) = find_series(folder)
    return found


def read(folder):
    ordered = stack(only(folder))
    return read_stack(ordered), ordered.notes


def rescaled(slices):
    return np.stack([s.pixel_array.T * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices], axis=-1)


def require_in_place(volume, slices):
    """Every slice stands where its own DICOM header puts it, with its own values."""
    for k, one in enumerate(slices):
        first = LPS_TO_RAS @ [*map(float, one.ImagePositionPatient), 1]
        np.testing.assert_allclose(volume.affine @ [0, 0, k, 1], first, atol=1e-4)
    np.testing.assert_array_equal(volume.array, rescaled(slices))


OBLIQUE = (0.9396926, 0.3420201, 0.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("orientation", "step"),
    [(AXIAL, (0, 0, 3.0)), (CORONAL, (0, 2.5, 0)), (OBLIQUE, (-0.684040 / 2 * 3, 0.9396926 * 3, 0))],
    ids=["axial", "coronal", "oblique"],
)
def test_slices_are_ordered_by_position_and_placed_as_dicom_says(tmp_path, orientation, step):
    slices = make_series(7, step, orientation)
    volume, notes = read(write_series(tmp_path, slices))
    assert notes == ()
    require_in_place(volume, slices)
    rows, columns = (np.array(orientation[:3]), np.array(orientation[3:]))
    np.testing.assert_allclose(volume.affine[:3, 0], (LPS_TO_RAS[:3, :3] @ rows) * 1.25, atol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 1], (LPS_TO_RAS[:3, :3] @ columns) * 1.5, atol=1e-6)
    assert volume.array.shape == (*SHAPE, 7)


def test_slices_that_come_from_feet_to_head_or_back_give_the_same_volume(tmp_path):
    slices = make_series(5)
    first, _ = read(write_series(tmp_path / "a", slices))
    second, _ = read(write_series(tmp_path / "b", slices[::-1]))
    np.testing.assert_array_equal(first.array, second.array)
    np.testing.assert_array_equal(first.affine, second.affine)


def test_itk_reads_the_same_volume(tmp_path):
    folder = write_series(tmp_path, make_series(6, (0, 0, 2.5)))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    volume, _ = read(folder)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).T)
    np.testing.assert_allclose(volume.spacing, image.GetSpacing())
    np.testing.assert_allclose(LPS_TO_RAS @ volume.affine @ [0, 0, 0, 1], [*image.GetOrigin(), 1])


def test_each_slice_has_its_own_rescale_slope(tmp_path):
    slices = make_series(4)
    for k, one in enumerate(slices):
        one.RescaleSlope, one.RescaleIntercept = 1 + 0.25 * k, 0
    volume, _ = read(write_series(tmp_path, slices))
    np.testing.assert_allclose(volume.array, rescaled(slices))


def test_a_missing_slice_is_refused(tmp_path):
    slices = make_series(12)
    with pytest.raises(BadImageError, match=r"slices are missing: 1\. Between slices 5 and 6 the gap is 6\.00 mm"):
        stack(only(write_series(tmp_path, slices[:5] + slices[6:])))


def test_uneven_distances_are_refused(tmp_path):
    slices = make_series(8)
    for k, one in enumerate(slices):
        one.ImagePositionPatient = [0, 0, 3.0 * k + (1.1 * (k - 4) if k > 4 else 0)]
    with pytest.raises(BadImageError, match=r"between 3\.00 and 4\.10 mm apart"):
        stack(only(write_series(tmp_path, slices)))


def test_positions_that_are_rounded_are_accepted(tmp_path):
    slices = make_series(40, (0, 0, 0.625))
    for one in slices:
        one.ImagePositionPatient = [round(float(v), 1) for v in one.ImagePositionPatient]
    volume, _ = read(write_series(tmp_path, slices))
    assert volume.spacing[2] == pytest.approx(0.625, abs=0.003)


def test_gantry_tilt_is_refused_with_its_angle(tmp_path):
    with pytest.raises(BadImageError, match=r"gantry tilt, 14\.9 degrees.*dcm2niix"):
        stack(only(write_series(tmp_path, make_series(12, (0, 0.8, 3.0)))))


def test_a_localizer_among_the_slices_is_left_out(tmp_path):
    slices = make_series(12)
    localizer = make_series(1, orientation=CORONAL, like=slices[0])
    volume, notes = read(write_series(tmp_path, localizer + slices))
    require_in_place(volume, slices)
    assert notes == ("left out 1 of its images, of another orientation or voxel size (a localizer)",)


def test_two_stacks_in_one_series_are_refused(tmp_path):
    slices = make_series(6)
    other = make_series(6, (0, 2.5, 0), CORONAL, like=slices[0])
    with pytest.raises(BadImageError, match=r"2 orientations or voxel sizes \(6, 6 images\)"):
        stack(only(write_series(tmp_path, slices + other)))


def test_a_second_copy_of_a_slice_is_left_out(tmp_path):
    slices = make_series(5)
    renamed = copy.deepcopy(slices[2])
    renamed.SOPInstanceUID = renamed.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    write_series(tmp_path, [slices[1], renamed], "copy")
    volume, notes = read(write_series(tmp_path, slices))
    require_in_place(volume, slices)
    assert notes == ("left out 2 of its images, second copies of others",)


def test_two_phases_in_one_series_are_refused(tmp_path):
    slices = make_series(5)
    later = make_series(5, like=slices[0], RescaleIntercept=-900)
    with pytest.raises(BadImageError, match="10 images lie at 5 places, and images at one place differ"):
        stack(only(write_series(tmp_path, slices + later)))


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_images_without_a_place_are_refused(tmp_path, tag):
    slices = make_series(4)
    delattr(slices[1], tag)
    with pytest.raises(BadImageError, match=r"images without a place in space \(ImagePositionPatient\): 1 of 4"):
        stack(only(write_series(tmp_path, slices)))


def test_series_are_told_apart_by_their_uid_not_by_their_folder(tmp_path):
    first, second = make_series(3), make_series(4, Modality="MR")
    write_series(tmp_path / "mixed", first, "a")
    write_series(tmp_path / "mixed", second[:2], "b")
    write_series(tmp_path / "more", second[2:])
    (tmp_path / "mixed" / "DICOMDIR.txt").write_text("not an image")
    found = find_series(tmp_path)
    assert {s.uid: len(s.slices) for s in found} == {first[0].SeriesInstanceUID: 3, second[0].SeriesInstanceUID: 4}
    assert {s.modality for s in found} == {"CT", "MR"}


def test_a_cut_file_is_refused_by_name(tmp_path):
    write_series(tmp_path, make_series(4))
    path = tmp_path / "im002.dcm"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadImageError, match=r"im002\.dcm"):
        read(tmp_path)


def test_a_series_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    ordered = stack(only(write_series(tmp_path, make_series(4))))
    with pytest.raises(BadImageError, match="more than max_voxels"):
        read_stack(ordered, max_voxels=1000)


def multi_frame(slices):
    """The slices as one enhanced image."""
    one = copy.deepcopy(slices[0])
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    one.NumberOfFrames = len(slices)
    one.PixelData = b"".join(s.PixelData for s in slices)
    shared, orientation, measures, transform = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = slices[0].ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = slices[0].PixelSpacing, 3.0
    transform.RescaleIntercept, transform.RescaleSlope, transform.RescaleType = -1024, 1, "HU"
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([transform])
    one.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for s in slices:
        own, plane = Dataset(), Dataset()
        plane.ImagePositionPatient = s.ImagePositionPatient
        own.PlanePositionSequence = Sequence([plane])
        frames.append(own)
    one.PerFrameFunctionalGroupsSequence = Sequence(frames)
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(one, tag)
    del one.RescaleIntercept, one.RescaleSlope
    return one


@pytest.mark.parametrize("order", [1, -1])
def test_the_frames_of_an_enhanced_image_are_slices(tmp_path, order):
    slices = make_series(6)
    volume, _ = read(write_series(tmp_path, [multi_frame(slices[::order])]))
    require_in_place(volume, slices)


def test_frames_with_a_gap_are_refused(tmp_path):
    slices = make_series(6)
    with pytest.raises(BadImageError, match="missing"):
        stack(only(write_series(tmp_path, [multi_frame(slices[:2] + slices[3:])])))
