"""A DICOM series as one volume: the slices are ordered and checked by their positions before a voxel is used.

A NIfTI file describes a stack of parallel slices that are equally far apart. A series whose slices are not such a stack
is refused with the reason, because any reader that stacks it moves voxels by millimetres. What can be left out without
moving a voxel (a localizer, a second copy of a slice) is left out, and a note says so. A tilted gantry is refused: the
sheared affine would be exact, but ITK, and with it 3D Slicer, takes orthogonal axes only.

Positions and directions are those of DICOM (LPS, mm; PS3.3 C.7.6.2.1.1) until :func:`read_stack` returns a volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from aslseg.errors import BadImageError
from aslseg.types import Volume
from aslseg.volume.io import LPS_TO_RAS, write_image

TOLERANCE_MM = 0.1
ORIENTATION_TOLERANCE = 3e-4  # of a unit vector: less than the tolerance above over the width of a body
SAME_PLACE_MM = 0.01
STRAY_FRACTION = 0.25
BARE_EXTENSIONS = (".dcm", ".ima")
TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "Modality",
    "ImageType",
    "SeriesDescription",
    "Rows",
    "Columns",
    "PixelSpacing",
    "SliceThickness",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


@dataclass(frozen=True)
class Slice:
    """One image of a series, or one frame of a multi-frame image.

    Attributes:
        path: File that holds it.
        frame: Number of the frame in the file, from 0.
        instance: SOPInstanceUID.
        position: Centre of the first voxel, (3,), LPS mm.
        orientation: Directions of a row and of a column, (2, 3).
        spacing: Voxel size along a row and along a column, mm.
        size: Voxels in a row and in a column.
        thickness: SliceThickness, mm; 0 where it is not given.
    """

    path: Path
    frame: int
    instance: str
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]
    size: tuple[int, int]
    thickness: float = 0.0

    def same_grid(self, other: Slice) -> bool:
        """Whether both are parallel and have the same voxels in plane."""
        return (
            self.size == other.size
            and np.allclose(self.spacing, other.spacing, rtol=1e-4, atol=0)
            and np.allclose(self.orientation, other.orientation, rtol=0, atol=ORIENTATION_TOLERANCE)
        )


@dataclass(frozen=True)
class Series:
    """The images that share a SeriesInstanceUID.

    Attributes:
        uid: SeriesInstanceUID.
        study: StudyInstanceUID.
        patient: PatientID; often empty.
        modality: ``CT``, ``MR``, ...
        description: SeriesDescription.
        localizer: Whether all images are marked as localizers.
        slices: In the order of their files.
        unplaced: How many images give no position in space.
    """

    uid: str
    study: str
    patient: str
    modality: str
    description: str
    localizer: bool
    slices: tuple[Slice, ...]
    unplaced: int = 0


@dataclass(frozen=True)
class Stack:
    """Parallel slices that are equally far apart, in order.

    Attributes:
        slices: Along the normal of their plane.
        affine: Voxel index to RAS mm, 4 x 4.
        notes: What was left out, for the people who use the volume.
    """

    slices: tuple[Slice, ...]
    affine: np.ndarray
    notes: tuple[str, ...] = ()


def find_series(folder: Path, unreadable: list[str] | None = None) -> list[Series]:
    """Every series below a folder, by SeriesInstanceUID; files that are not DICOM are passed over.

    Args:
        folder: Searched with everything below it.
        unreadable: Gets a line for each damaged DICOM file.

    Returns:
        Sorted by uid.
    """
    found: dict[str, list[tuple[Path, Dataset]]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        header = read_header(path)
        if header is not None and header.get("SeriesInstanceUID"):
            found.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
        elif header is None and path.suffix.lower() in BARE_EXTENSIONS and unreadable is not None:
            unreadable.append(f"{path.relative_to(folder)}: not readable as DICOM; copy or export it again")
    return [_series(uid, files) for uid, files in sorted(found.items())]


def read_header(path: Path) -> Dataset | None:
    """The tags of a DICOM file that place it; None if the file is not DICOM, or damaged."""
    # some exports lack the preamble and the file meta information of PS3.10
    force = path.suffix.lower() in BARE_EXTENSIONS
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS), force=force)
    except (InvalidDicomError, OSError, ValueError, EOFError, AttributeError):
        return None
    return header if "SOPClassUID" in header else None


def stack(series: Series) -> Stack:
    """Order the slices of a series, and check that they are one even stack.

    Raises:
        BadImageError: No positions, several orientations, different images at one place, a missing slice, uneven
            distances or a tilted gantry.
    """
    if series.unplaced or not series.slices:
        total = series.unplaced + len(series.slices)
        raise BadImageError(
            f"images without a place in space (ImagePositionPatient): {series.unplaced} of {total}; "
            "export the original series"
        )
    notes: list[str] = []
    slices = _without_strays(series.slices, notes)
    origin = slices[0].orientation
    normal = np.cross(origin[0], origin[1])
    slices = sorted(slices, key=lambda s: float(s.position @ normal))
    slices = _without_copies(slices, normal, notes)
    positions = np.array([s.position for s in slices])
    if len(slices) == 1:
        step = normal * (slices[0].thickness or 1.0)
    else:
        _require_even(positions, normal)
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0] = origin[0] * slices[0].spacing[0]
    affine[:3, 1] = origin[1] * slices[0].spacing[1]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return Stack(tuple(slices), LPS_TO_RAS @ affine, tuple(notes))


def read_stack(ordered: Stack, max_voxels: float = 1.6e9) -> Volume:
    """The voxels of a stack, with each slice's own rescale slope and intercept applied.

    Returns:
        float32 array (i, j, k): column, row, slice; RAS affine.

    Raises:
        BadImageError: A slice that cannot be decoded, or more than ``max_voxels``.
    """
    first = ordered.slices[0]
    shape = (*first.size, len(ordered.slices))
    if math.prod(shape) > max_voxels:
        raise BadImageError(f"{math.prod(shape):.3g} voxels, more than max_voxels = {max_voxels:.3g}")
    out = np.empty(shape, np.float32)
    frames = cache(_frames) if any(s.frame for s in ordered.slices) else _frames
    for k, one in enumerate(ordered.slices):
        pixels = frames(one.path)[one.frame]
        if pixels.T.shape != first.size:
            raise BadImageError(f"{one.path.name}: {pixels.T.shape} voxels; its header says {first.size}")
        out[:, :, k] = pixels.T
    return Volume(out, ordered.affine)


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume that was read from DICOM as NIfTI, atomically and without rounding any voxel."""
    whole = np.iinfo(np.int16)
    array = volume.array
    fits = array.min() >= whole.min and array.max() <= whole.max and bool((array == np.rint(array)).all())
    write_image(path, volume, np.int16 if fits else np.float32)


def _frames(path: Path) -> np.ndarray:
    """Rescaled intensities of a file, (frame, row, column)."""
    import SimpleITK as sitk  # noqa: N813 - the library's own abbreviation

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise BadImageError(f"{path.name}: its pixels cannot be read ({reason}); copy or export it again") from None
    if array.ndim != 3:
        raise BadImageError(f"{path.name}: pixels with {array.ndim} dimensions; expected grey values")
    return array


def _series(uid: str, files: Sequence[tuple[Path, Dataset]]) -> Series:
    slices: list[Slice] = []
    unplaced, localizers = 0, 0
    for path, header in files:
        try:
            slices.extend(_slices(path, header))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            unplaced += 1
        localizers += "LOCALIZER" in [str(v).upper() for v in header.get("ImageType", None) or ()]
    first = files[0][1]
    text = {tag: str(first.get(tag, "") or "").strip() for tag in TAGS[3:8]}
    return Series(
        uid,
        text["StudyInstanceUID"],
        text["PatientID"],
        text["Modality"],
        text["SeriesDescription"],
        localizers == len(files),
        tuple(slices),
        unplaced,
    )


def _slices(path: Path, header: Dataset) -> Iterator[Slice]:
    """The slices of a file; raises one of many errors where a tag is missing or is no number."""
    groups: Any = header.get("PerFrameFunctionalGroupsSequence", None)
    if groups is None:
        if int(header.get("NumberOfFrames", None) or 1) != 1:
            raise KeyError("frames without positions")
        yield _slice(path, 0, header, header, header, header)
        return
    shared = header.SharedFunctionalGroupsSequence[0]
    for frame, own in enumerate(groups):
        plane = own.PlanePositionSequence[0]
        orientation = _group(own, shared, "PlaneOrientationSequence")
        yield _slice(path, frame, header, plane, orientation, _group(own, shared, "PixelMeasuresSequence"))


def _group(own: Dataset, shared: Dataset, name: str) -> Dataset:
    return (own if name in own else shared)[name].value[0]


def _slice(path: Path, frame: int, header: Dataset, plane: Dataset, turned: Dataset, measures: Dataset) -> Slice:
    position = np.array([float(v) for v in plane.ImagePositionPatient])
    orientation = np.array([float(v) for v in turned.ImageOrientationPatient]).reshape(2, 3)
    along_column, along_row = (float(v) for v in measures.PixelSpacing)
    numbers = [*position, *orientation.flat, along_column, along_row]
    if len(position) != 3 or not np.isfinite(numbers).all() or min(along_column, along_row) <= 0:
        raise ValueError("no position")
    size = (int(header.Columns), int(header.Rows))
    thickness = float(measures.get("SliceThickness", None) or 0)
    return Slice(
        path, frame, str(header.SOPInstanceUID), position, orientation, (along_row, along_column), size, thickness
    )


def _without_strays(slices: Iterable[Slice], notes: list[str]) -> list[Slice]:
    """The slices of the most frequent orientation and size, if the others are few."""
    groups: list[list[Slice]] = []
    for one in slices:
        group = next((g for g in groups if one.same_grid(g[0])), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    groups.sort(key=len, reverse=True)
    kept, strays = groups[0], sum(len(g) for g in groups[1:])
    if strays > STRAY_FRACTION * len(kept):
        sizes = ", ".join(str(len(g)) for g in groups)
        raise BadImageError(
            f"its images have {len(groups)} orientations or voxel sizes ({sizes} images); one volume has one. "
            "Export each as a series of its own"
        )
    if strays:
        notes.append(f"left out {strays} of its images, of another orientation or voxel size (a localizer)")
    return kept


def _without_copies(slices: Sequence[Slice], normal: np.ndarray, notes: list[str]) -> list[Slice]:
    """Ordered slices, each place once."""
    kept = [slices[0]]
    for one in slices[1:]:
        before = kept[-1]
        if float((one.position - before.position) @ normal) > SAME_PLACE_MM:
            kept.append(one)
        elif not _is_copy(one, before):
            places = len({round(float(s.position @ normal), 2) for s in slices})
            raise BadImageError(
                f"its {len(slices)} images lie at {places} places, and images at one place differ (phases, echoes, or "
                "two reconstructions in one series); export each as a series of its own"
            )
    if len(kept) < len(slices):
        notes.append(f"left out {len(slices) - len(kept)} of its images, second copies of others")
    return kept


def _is_copy(one: Slice, other: Slice) -> bool:
    if (one.instance, one.frame) == (other.instance, other.frame):
        return True
    apart = float(np.abs(one.position - other.position).max())
    return apart <= SAME_PLACE_MM and np.array_equal(_frames(one.path)[one.frame], _frames(other.path)[other.frame])


def _require_even(positions: np.ndarray, normal: np.ndarray) -> None:
    """Refuse positions (n, 3) that are not in a line along the normal, equally far apart."""
    offsets = positions - positions[0]
    along = offsets @ normal
    sideways = float(np.linalg.norm(offsets - along[:, None] * normal, axis=1).max())
    if sideways > TOLERANCE_MM:
        degrees = math.degrees(math.atan2(sideways, float(along[-1])))
        raise BadImageError(
            f"its slices are shifted sideways by up to {sideways:.1f} mm (gantry tilt, {degrees:.1f} degrees), "
            "and a straight stack of them would misplace voxels; convert it with dcm2niix, which straightens a tilted "
            "series, and use that NIfTI file"
        )
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    off = float(np.abs(along - np.linspace(0, along[-1], len(along))).max())
    if off <= TOLERANCE_MM:
        return
    wide = [k for k in range(len(gaps)) if gaps[k] > 1.5 * usual]
    multiples = np.rint(gaps / usual)
    if wide and np.abs(gaps - multiples * usual).max() <= max(TOLERANCE_MM, 0.05 * usual):
        missing = int((multiples - 1).sum())
        where = ", ".join(f"{k + 1} and {k + 2}" for k in wide[:3])
        raise BadImageError(
            f"slices are missing: {missing}. Between slices {where} the gap is {gaps[wide[0]]:.2f} mm, elsewhere "
            f"{usual:.2f} mm. Send or export the complete series again"
        )
    raise BadImageError(
        f"its slices are between {gaps.min():.2f} and {gaps.max():.2f} mm apart; one volume has one distance. "
        "Export a reconstruction with even slices, or each part as a series of its own"
    )
