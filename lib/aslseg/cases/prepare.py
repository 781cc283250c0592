"""Cases brought to the working grid once, and kept as memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import Case
from aslseg.compute.hardware import resolved
from aslseg.errors import BadImageError, BadLabelError
from aslseg.files import DAMAGED, FileHashes, allow_open_files, atomic_file
from aslseg.settings import Settings
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.intensity import normalise
from aslseg.volume.io import read_header, read_image, read_label

logger = logging.getLogger(__name__)

Spacing = tuple[float, float, float] | None

LESIONS_KEPT = 1
"""Version of how nested labels are brought to the working grid: 1 keeps a voxel of each lesion."""
MAX_ENLARGEMENT = 25  # voxels of a scan's working grid, as a multiple of what the median scan may have


def working_spacing(volumes: Iterable[Volume], settings: Settings) -> Spacing:
    """The working spacing for the setting ``spacing``.

    ``auto`` takes the per-axis median (RAS-closest axes) of the given scans, then coarsens the finest axis or axes
    step by step until the median scan has at most ``max_working_voxels``.

    Returns:
        (x, y, z) in mm, or None for ``native``.
    """
    if settings.spacing == "native":
        return None
    if settings.spacing != "auto":
        return settings.spacing
    grids = [Grid.of(v, None) for v in volumes]
    spacing = np.median([g.spacing for g in grids], axis=0)
    extent = np.median([np.multiply(g.spacing, g.shape) for g in grids], axis=0)
    while np.prod(extent / spacing) > settings.max_working_voxels:
        finest = spacing.min()
        spacing[spacing <= finest * 1.001] *= 1.02
    x, y, z = (round(float(s), 4) for s in spacing)
    return x, y, z


def prepare(volume: Volume, settings: Settings, spacing: Spacing) -> tuple[np.ndarray, Grid]:
    """Bring one scan to the working grid: (i, j, k) float32 in 0..1, and the grid.

    Raises:
        BadImageError: The working grid is far larger than that of the median scan and than the scan itself; then the
            voxel size is wrong.
    """
    grid = Grid.of(volume, spacing)
    most = max(MAX_ENLARGEMENT * settings.max_working_voxels, math.prod(grid.native_shape))
    if math.prod(grid.shape) > most:
        i, j, k = (float(f"{size:.3g}") for size in volume.spacing)
        raise BadImageError(
            f"a scan of {' x '.join(map(str, grid.native_shape))} voxels of {i} x {j} x {k} mm would have "
            f"{math.prod(grid.shape):.2g} voxels on the working grid, more than {most:.2g}; correct its voxel size, "
            "crop it, or raise max_working_voxels"
        )
    return grid.to_working(normalise(volume.array, settings)), grid


UNUSED_SECONDS = 7 * 24 * 3600.0


class PreparedStore:
    """Prepared cases on disk, found again by the hashes of their files and the settings of the preparation.

    Args:
        folder: Cache folder (:attr:`aslseg.settings.Paths.cache`).
        settings: Window, labels and size limit.
        spacing: Working spacing in mm along x, y, z; None keeps that of the scans.
        hashes: Shared by the stores of a round, so that each file is hashed once.
    """

    def __init__(self, folder: Path, settings: Settings, spacing: Spacing, hashes: FileHashes | None = None) -> None:
        self.folder, self.settings, self.spacing = folder, settings, spacing
        self.hashes = hashes or FileHashes()
        self.used: set[Path] = set()

    def prune(self) -> None:
        """Delete what lies in the folder for other labels, scans or settings than those that were loaded here.

        What is younger than UNUSED_SECONDS stays: a scan may be away for a night, and another model may have another
        grid. Only where nobody else opens files of this folder by their names, as a round that holds its lock.
        """
        for path in set(self.folder.glob("*.npy")) - self.used:
            with suppress(FileNotFoundError):  # somebody empties the cache
                if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                    path.unlink()

    def load(self, case: Case) -> Prepared:
        """The case on the working grid; the image is a read-only memory map.

        Raises:
            BadImageError, BadLabelError: As the readers.
        """
        chosen = self.settings.model_dump(include={"modality", "window_low", "window_high", "labels", "nested"})
        image_hash, label_hash = self.hashes(case.image), self.hashes(case.label) if case.label else ""
        text = json.dumps([image_hash, label_hash, self.spacing, chosen], sort_keys=True)
        entry = f"{case.id}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        grid = Grid.of(read_header(case.image), self.spacing)
        version = f"-lesions{LESIONS_KEPT}" if lesions_may_vanish(grid, self.settings) else ""
        files = [self.folder / f"{entry}{version}.label.npy", self.folder / f"{entry}.image.npy"]
        wanted = files if case.label else files[1:]
        self.used.update(wanted)
        arrays = {f: array for f in wanted if (array := _open_array(f)) is not None}
        if len(arrays) < len(wanted):
            volume = read_image(case.image, self.settings.max_voxels)
            image, grid = prepare(volume, self.settings, self.spacing)
            if case.label:
                label = read_label(case.label, volume, self.settings.label_set, self.settings.max_voxels)
                save_array(files[0], grid.label_to_working(label, self.settings.label_set))
            save_array(files[1], image)
            arrays = {f: np.load(f, mmap_mode="r") for f in wanted}
        return Prepared(
            case.id,
            case.patient,
            arrays[files[1]],
            grid,
            arrays.get(files[0]),
            image_hash=image_hash,
            label_hash=label_hash,
        )

    def load_all(self, cases: Iterable[Case]) -> tuple[list[Prepared], dict[str, str]]:
        """All cases that can be read, and the reason for each that cannot."""
        allow_open_files()
        prepared, skipped = [], {}
        for case in cases:
            try:
                prepared.append(self.load(case))
            except (BadImageError, BadLabelError) as error:
                logger.warning("skipped case %s: %s", case.id, error)
                skipped[case.id] = str(error)
        return prepared, skipped


def lesions_may_vanish(grid: Grid, settings: Settings) -> bool:
    """Whether bringing a label to the working grid may lose a small lesion: the grid is another one than the scan's."""
    return settings.label_set.has_nested and sorted(grid.shape) != sorted(grid.native_shape)


def _open_array(path: Path) -> np.ndarray | None:
    """Map a kept array; None where there is none, or a damaged one, which is computed again."""
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        logger.warning("%s is damaged (%s); it is computed again", path.name, error)
        return None


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file to be memory-mapped, atomically."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array))


def automatic_patch(shapes: Iterable[tuple[int, ...]], settings: Settings) -> tuple[int, int, int]:
    """Training patch in voxels of the working grid, each axis a multiple of 16.

    ``auto`` starts from the median shape and shrinks the longest axis until the patch has at most ``patch_voxels``.
    Never below (32, 32, 16): a deepest level of a single voxel leaves batch norm two values to normalise.
    """
    if settings.patch != "auto":
        size = [max(16, round(n / 16) * 16) for n in settings.patch]
    else:
        size = [max(16, math.ceil(n / 16) * 16) for n in np.median(list(shapes), axis=0)]
        most = resolved(settings).patch_voxels
        while math.prod(size) > most and max(size) > 16:
            size[int(np.argmax(size))] -= 16
    i, j, k = size
    return max(i, 32), max(j, 32), k
