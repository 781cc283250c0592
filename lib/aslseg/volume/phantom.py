"""Synthetic abdominal CTs in Hounsfield units, so that everything can be tried and tested without patients.

Organs are ellipsoids whose border is moved by a Gaussian random field; what makes segmentation hard in real scans is
there on purpose: bright vessels beside bright lesions, a dark gallbladder at the liver's edge, partial volume in
thick slices, correlated noise, and a contrast phase that differs from scan to scan.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from aslseg.errors import BadSettingsError
from aslseg.types import ProgressCallback, Volume, no_progress
from aslseg.volume.io import write_image, write_label

SHAPE = (96, 96, 32)
SMALLEST = (24, 24, 8)
FIELD_MM = (192.0, 192.0, 160.0)
LIVER, TUMOUR = 1, 2
ROUGHNESS_MM = 11.0

# Name: centre and semi-axes in mm (x to the patient's right, y to the front, z to the head), mean HU and its spread
# between patients. Painted in this order, before the liver.
ORGANS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float, float]] = {
    "aorta": ((-9, -24, 0), (9, 9, 1e4), 150, 12),
    "right kidney": ((44, -34, -48), (16, 15, 30), 140, 10),
    "left kidney": ((-42, -34, -40), (16, 15, 30), 140, 10),
    "spleen": ((-58, -18, 18), (19, 26, 32), 112, 10),
    "stomach": ((-40, 18, 2), (24, 22, 34), 25, 15),
    "spine": ((0, -46, 0), (18, 14, 1e4), 230, 20),
}
RIGHT_LOBE = ((36.0, 0.0, 8.0), (44.0, 46.0, 42.0))
LEFT_LOBE = ((-2.0, 26.0, 20.0), (46.0, 20.0, 24.0))


@dataclass(frozen=True)
class Difficulty:
    """What can be made easier or harder.

    Attributes:
        contrast: Factor on the difference between tumours and liver.
        noise: Factor on the noise.
        p_hyperdense, p_rim: Chance that a tumour is brighter than the liver, or has a bright rim; else it is darker.
        p_isodense: Chance that a tumour keeps only a fifth of its contrast.
        p_negative: Chance that a scan has no tumour.
        scanner_shift: HU added to or taken from half of the scans (another scanner).
    """

    contrast: float = 1.0
    noise: float = 1.0
    p_hyperdense: float = 0.15
    p_rim: float = 0.15
    p_isodense: float = 0.0
    p_negative: float = 0.0
    scanner_shift: float = 0.0


class _Scene:
    """The grid of one scan: coordinates in mm from its centre along RAS axes, and random fields on it."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
        self.rng = rng
        self.shape = shape
        in_plane, between = rng.uniform(0.96, 1.04, 2)
        self.spacing = np.array(FIELD_MM) / shape * [in_plane, in_plane, between]
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, self.spacing, strict=True)]
        self.mm = np.stack(np.meshgrid(*axes, indexing="ij"))

    def field(self, sigma_mm: float) -> np.ndarray:
        """Gaussian random field of zero mean and unit variance."""
        smooth = ndimage.gaussian_filter(self.rng.standard_normal(self.shape), sigma_mm / self.spacing)
        return (smooth - smooth.mean()) / smooth.std()

    def quadratic(self, centre: Any, semi_axes: Any) -> np.ndarray:
        """Quadratic form of an ellipsoid: below 1 inside."""
        offset = (self.mm - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(semi_axes, (3, 1, 1, 1))
        return np.square(offset).sum(0)

    def near(self, points: np.ndarray, radius: float, where: np.ndarray) -> np.ndarray:
        """Voxels of the mask ``where`` that lie within ``radius`` mm of any of the points (n, 3)."""
        found = np.zeros(self.shape, bool)
        distance, _ = cKDTree(points).query(self.mm[:, where].T, distance_upper_bound=radius)
        found[where] = np.isfinite(distance)
        return found


def make_phantom(
    seed: int, case: int, *, shape: tuple[int, int, int] = SHAPE, difficulty: Difficulty | None = None
) -> tuple[Volume, np.ndarray]:
    """One abdomen; the same arguments give the same voxels.

    The field of view is about 192 x 192 x 160 mm whatever the shape. Every third scan is stored in LPS order (first
    two axes reversed, affine to match), as many real NIfTI files are.

    Args:
        seed: Seed of the whole set.
        case: Number of the scan in the set.
        shape: Voxels along x, y, z; at least (24, 24, 8).
        difficulty: Knobs; None takes the defaults.

    Returns:
        The scan, float32 HU (i, j, k) with its RAS affine in mm, and its class map (i, j, k) uint8: 1 liver, 2 tumour.

    Raises:
        BadSettingsError: A negative seed or case, or too small a shape.
    """
    if len(shape) != 3 or any(n < least for n, least in zip(shape, SMALLEST, strict=True)):
        raise BadSettingsError(f"phantom: shape {tuple(shape)}; expected three numbers of at least {SMALLEST}")
    if seed < 0 or case < 0:
        raise BadSettingsError(f"phantom: seed {seed}, case {case}; expected numbers from 0")
    knobs = difficulty or Difficulty()
    rng = np.random.default_rng([seed, case])
    scene = _Scene(rng, shape)
    hu, cavity = _body(scene)
    liver = _liver(scene, hu, cavity)
    tumour = _tumours(scene, hu, liver, knobs)
    scan = _scanner(scene, hu, knobs)
    class_map = np.where(tumour, TUMOUR, np.where(liver, LIVER, 0)).astype(np.uint8)

    affine = np.diag([*scene.spacing, 1.0])
    affine[:3, 3] = scene.mm[:, 0, 0, 0] + [0, 0, np.round(rng.uniform(-400, 400))]
    if case % 3 == 2:
        affine = affine @ np.array([[-1, 0, 0, shape[0] - 1], [0, -1, 0, shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
        scan, class_map = scan[::-1, ::-1], class_map[::-1, ::-1]
    return Volume(np.ascontiguousarray(scan, np.float32), affine), np.ascontiguousarray(class_map)


def write_studies(
    out: Path,
    cases: int,
    labelled: int,
    seed: int,
    *,
    shape: tuple[int, int, int] = SHAPE,
    difficulty: Difficulty | None = None,
    overwrite: bool = False,
    report: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Write a MONAI Label studies folder of phantoms; the same arguments give the same bytes.

    Scans are ``out/phantom_000.nii.gz`` and so on; the first ``labelled`` have their label in ``out/labels/final``.
    The truth of all others goes to the sibling folder ``<out>_truth``, where no training can see it.

    Args:
        out: The studies folder.
        cases: Number of scans.
        labelled: How many of them get a label, from 0 to ``cases``.
        seed: Seed of the set.
        shape, difficulty: As for :func:`make_phantom`.
        overwrite: Replace the two folders, with labels and rounds in them, if all their scans are phantoms.
        report: Called after each scan.

    Returns:
        ``studies`` and ``truth`` (folders), ``labelled`` and ``unlabelled`` (ids), ``seed`` and ``shape``.

    Raises:
        BadSettingsError: Impossible numbers, or a folder that is not empty.
        DiskFullError: The disk filled up.
    """
    if cases < 1 or not 0 <= labelled <= cases:
        raise BadSettingsError(
            f"phantom: {cases} cases, {labelled} of them labelled; expected 1 case or more, 0..cases labelled"
        )
    out = Path(out)
    truth = out.parent / f"{out.name}_truth"
    for folder in (out, truth):
        _clear(folder, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    truth.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(cases - 1)))
    names = [f"phantom_{n:0{digits}d}" for n in range(cases)]
    for n, name in enumerate(names):
        scan, class_map = make_phantom(seed, n, shape=shape, difficulty=difficulty)
        write_image(out / f"{name}.nii.gz", scan)
        folder = out / "labels" / "final" if n < labelled else truth
        write_label(folder / f"{name}.nii.gz", class_map, scan.affine)
        report(n + 1, cases)
    return {
        "studies": str(out),
        "truth": str(truth),
        "labelled": names[:labelled],
        "unlabelled": names[labelled:],
        "seed": seed,
        "shape": list(shape),
    }


def _clear(folder: Path, overwrite: bool) -> None:
    """Make sure that nothing is in the way; delete only what we made ourselves, and only when asked to."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadSettingsError(f"{folder} is a file; expected an empty or new folder for the phantoms")
    found = sorted(folder.iterdir())
    if not found:
        return
    if not overwrite:
        raise BadSettingsError(f"{folder} is not empty; choose another folder, or overwrite it")
    foreign = [p.name for p in found if p.is_file() and not p.name.startswith(("phantom_", ".", "datastore"))]
    if foreign or not any(p.name.startswith("phantom_") for p in found):
        raise BadSettingsError(
            f"{folder} holds more than phantoms ({', '.join(foreign[:3]) or 'no phantom scan'}); "
            "choose another folder, nothing was deleted"
        )
    shutil.rmtree(folder)


def _body(scene: _Scene) -> tuple[np.ndarray, np.ndarray]:
    """Everything but the liver.

    Returns:
        HU (i, j, k) float64, and where the abdominal cavity is, bool.
    """
    rng = scene.rng
    quadratic = scene.quadratic((0, 0, 0), np.array([91, 74, 1e4]) * rng.uniform(0.98, 1.02)) + 0.03 * scene.field(30)
    hu = np.full(scene.shape, -1000.0)
    hu[quadratic < 1] = -95
    hu[quadratic < 0.9] = 55
    cavity = quadratic < 0.78
    hu[cavity] = -90
    bowel = cavity & (scene.field(9) > 0.4) & (scene.mm[2] < 0) & (scene.mm[1] > -30)
    hu[bowel] = rng.normal(35, 5)
    for name, (centre, semi_axes, mean, spread) in ORGANS.items():
        moved = np.add(centre, rng.normal(0, 2, 3))
        rough = 0.05 if name in ("aorta", "spine") else 0.18
        inside = scene.quadratic(moved, np.multiply(semi_axes, rng.uniform(0.9, 1.1))) + rough * scene.field(
            ROUGHNESS_MM
        )
        organ = (inside < 1) & (quadratic < 0.9)
        hu[organ] = rng.normal(mean, spread)
    hu[(scene.quadratic((0, -49, 0), (7, 6, 1e4)) < 1)] = 20
    return hu, cavity


def _liver(scene: _Scene, hu: np.ndarray, cavity: np.ndarray) -> np.ndarray:
    """Paint liver, vessels and gallbladder into ``hu``; returns where the liver is."""
    rng = scene.rng
    size = rng.uniform(0.85, 1.1)
    moved = rng.normal(0, 3, 3)
    lobes = [scene.quadratic(np.add(c, moved), np.multiply(s, size)) for c, s in (RIGHT_LOBE, LEFT_LOBE)]
    shape = np.minimum(*lobes) + 0.16 * scene.field(ROUGHNESS_MM) < 1
    spine = scene.quadratic((0, -46, 0), (24, 20, 1e4)) < 1
    pieces, _ = ndimage.label(shape & cavity & ~spine)
    liver = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    base = np.clip(rng.normal(105, 14), 90, 122)
    hu[liver] = base + rng.uniform(4, 8) * scene.field(4)[liver]

    hilum = np.add(np.add(RIGHT_LOBE[0], moved), (-14, 4, -6))
    for _ in range(int(rng.integers(4, 8))):
        path = _walk(rng, hilum + rng.normal(0, 8, 3), length_mm=110)
        vessel = scene.near(path, max(rng.uniform(2.5, 5), 0.6 * scene.spacing[0]), liver)
        hu[vessel] = base + rng.uniform(25, 50)

    # The gallbladder hangs on the lower front edge: halfway in, then what is inside the liver is cut away.
    edge = scene.mm[:, liver][:, np.argmin(scene.mm[:, liver].T @ [0.35, -0.5, 0.8])]
    gallbladder = scene.quadratic(np.add(edge, (-2, 4, -4)), (11, 13, 17)) + 0.08 * scene.field(ROUGHNESS_MM) < 1
    hu[gallbladder & ~liver & cavity] = rng.normal(12, 5)
    return liver


def _walk(rng: np.random.Generator, start: np.ndarray, length_mm: float, step_mm: float = 1.5) -> np.ndarray:
    """A smooth random path, points (n, 3) in mm."""
    direction = rng.normal(0, 1, 3)
    points = [start]
    for _ in range(int(length_mm / step_mm)):
        direction = direction / np.linalg.norm(direction) + rng.normal(0, 0.15, 3)
        points.append(points[-1] + step_mm * direction / np.linalg.norm(direction))
    return np.array(points)


def _tumours(scene: _Scene, hu: np.ndarray, liver: np.ndarray, knobs: Difficulty) -> np.ndarray:
    """Paint one to five tumours into ``hu``; returns where they are, always inside the liver."""
    rng = scene.rng
    tumour = np.zeros(scene.shape, bool)
    if rng.random() < knobs.p_negative:
        return tumour
    depth = ndimage.distance_transform_edt(liver, sampling=scene.spacing)
    base = float(np.median(hu[liver]))
    for _ in range(int(rng.integers(1, 6))):
        radius = float(np.clip(rng.lognormal(2.35, 0.45), 4, 24))
        allowed = np.argwhere(depth >= min(0.6 * radius, 0.8 * depth.max()))
        centre = tuple(allowed[int(rng.integers(len(allowed)))])
        form = scene.quadratic(scene.mm[(slice(None), *centre)], radius * rng.uniform(0.8, 1.25, 3))
        lesion = (form + 0.25 * scene.field(max(radius / 2, 3)) < 1) & liver
        lesion[centre] = True
        pieces, _ = ndimage.label(lesion)
        lesion = pieces == pieces[centre]
        _paint_tumour(scene, hu, lesion, base, knobs)
        tumour |= lesion
    return tumour


def _paint_tumour(scene: _Scene, hu: np.ndarray, lesion: np.ndarray, base: float, knobs: Difficulty) -> None:
    rng = scene.rng
    kind = rng.random()
    contrast = knobs.contrast * (0.2 if rng.random() < knobs.p_isodense else 1.0)
    texture = 6 * scene.field(4)[lesion]
    if kind < knobs.p_hyperdense:
        hu[lesion] = base + contrast * rng.uniform(30, 60) + texture
    elif kind < knobs.p_hyperdense + knobs.p_rim:
        hu[lesion] = base - contrast * rng.uniform(30, 60) + texture
        core = ndimage.binary_erosion(lesion, ndimage.generate_binary_structure(2, 1)[:, :, None])
        hu[lesion & ~core] = base + contrast * rng.uniform(15, 35)
    else:
        hu[lesion] = base - contrast * rng.uniform(18, 45) + texture


def _scanner(scene: _Scene, hu: np.ndarray, knobs: Difficulty) -> np.ndarray:
    """What a scanner makes of it: partial volume, noise that is correlated in the slice, an offset."""
    rng = scene.rng
    blurred = ndimage.gaussian_filter(hu, (0.7, 0.7, 0.35))
    noise = ndimage.gaussian_filter(rng.standard_normal(scene.shape), (0.6, 0.6, 0))
    shift = knobs.scanner_shift * rng.choice([0, 0, -1, 1])
    scan = blurred + knobs.noise * rng.uniform(11, 20) * noise / noise.std() + shift
    return np.clip(scan, -1024, 3071)
