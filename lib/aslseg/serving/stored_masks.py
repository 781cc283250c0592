"""Masks that the studies folder has for a scan: submitted by people, promoted by rounds, or automatic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from aslseg.cases.studies import ORIGINAL
from aslseg.compute.byte_lru import ByteLRU
from aslseg.errors import AslsegError
from aslseg.files import FileStamp
from aslseg.serving.open_scans import OpenScan
from aslseg.settings import Paths, Settings
from aslseg.types import Volume
from aslseg.volume.container import IMAGE_EXTENSIONS
from aslseg.volume.io import read_image, read_label

MASK_BYTES = 400_000_000
Key = tuple[object, ...]


class StoredMasks:
    """Class maps of a studies folder, read when they are asked for and kept while their files stay the same.

    Args:
        settings: The labels, and the size limit of files.
        paths: Where the studies are.
    """

    def __init__(self, settings: Settings, paths: Paths) -> None:
        self.settings, self.paths = settings, paths
        self._kept: ByteLRU[Key, np.ndarray] = ByteLRU(MASK_BYTES, lambda kept: sum(array.nbytes for array in kept))

    def find(self, path: Path, case: str | None, opened: OpenScan, tag: str) -> tuple[Key, np.ndarray] | None:
        """The class map (i, j, k), uint8, on the grid of a scan, and a key for it; None without a usable one.

        Args:
            path: The scan.
            case: Its id in the studies folder; None for an upload.
            opened: The scan.
            tag: Of the label. An automatic mask that is older than its scan was made for another one.
        """
        label = self._file(case, tag)
        stamp = None if label is None else FileStamp.of(label)
        if label is None or stamp is None or (tag == ORIGINAL and path.stat().st_mtime_ns > stamp.mtime_ns):
            return None
        key: Key = (str(label), stamp)
        found = self._kept.get(key)
        if found is None:
            image = Volume(np.broadcast_to(np.float32(0), opened.orientation.shape), opened.affine)
            try:
                found = read_label(label, image, self.settings.label_set, self.settings.max_voxels)
            except AslsegError:
                return None
            self._kept.put(key, found)
        return None if found.shape != opened.orientation.shape else (key, found)

    def _file(self, case: str | None, tag: str) -> Path | None:
        if not isinstance(case, str) or self.paths.studies is None:
            return None
        folder = self.paths.studies / "labels" / tag
        return next((p for e in IMAGE_EXTENSIONS if (p := folder / f"{case}{e}").is_file()), None)

    def values(self, key: Key, class_map: np.ndarray) -> frozenset[int]:
        """The values that occur in a class map with this key."""
        counts = self._once((*key, "counts"), lambda: np.bincount(class_map.ravel(order="K")))
        return frozenset(np.flatnonzero(counts).tolist())

    def region(self, key: Key, class_map: np.ndarray, values: list[int]) -> np.ndarray:
        """Where a class map with this key has one of some values, bool (i, j, k)."""
        return self._once((*key, *values), lambda: np.isin(class_map, values))

    def components(self, key: Key, class_map: np.ndarray, value: int) -> np.ndarray:
        """The separate objects with a value, numbered from 1, int32 (i, j, k).

        Voxels that share a corner belong together.

        Args:
            key: Of the class map.
            class_map: (i, j, k).
            value: Of the label.
        """
        return self._once((*key, "components", value), lambda: ndimage.label(class_map == value, np.ones((3, 3, 3)))[0])

    def _once(self, name: Key, make: Callable[[], np.ndarray]) -> np.ndarray:
        found = self._kept.get(name)
        if found is None:
            found = make()
            self._kept.put(name, found)
        return found


def stored_mask(paths: Paths, case: str, image: Path) -> Volume | None:
    """The mask that clients show for a scan (tag ``original``), uint8; None without one that was made for this file."""
    if paths.studies is None:
        return None
    label = paths.studies / "labels" / ORIGINAL / f"{case}.nii.gz"
    try:
        if image.stat().st_mtime_ns > label.stat().st_mtime_ns:
            return None
        stored = read_image(label)
    except (AslsegError, OSError):
        return None
    return Volume(stored.array.astype(np.uint8), stored.affine)
