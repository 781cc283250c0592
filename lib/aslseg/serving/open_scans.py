"""Scans that are open for clicks: their own voxels, oriented as SAM saw slices in training, and the way back."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from aslseg.compute.byte_lru import ByteLRU
from aslseg.errors import BadImageError
from aslseg.files import FileStamp
from aslseg.prompts.from_client import ClientPrompt
from aslseg.sam.predictor.slices import SliceSource
from aslseg.settings import Settings
from aslseg.volume.intensity import window_of
from aslseg.volume.io import read_image

KEPT_BYTES = 1_500_000_000
FLAT = 8  # times as long as its shortest axis: such a scan is a few slices along that axis
OBLONG = 2.0  # times as long as wide: the pixels of axial slices in a scan that was not made of axial slices


@dataclass(frozen=True)
class SliceOrientation:
    """Maps the array of a scan to one with RAS-closest axes, the sliced one last, and back. Nothing is resampled.

    Attributes:
        axes: For each axis of the sliced volume, that of the scan.
        flipped: Whether the axis of the scan runs the other way.
        shape: Of the scan.
        sliced: RAS axis that is sliced: 2 is axial.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    shape: tuple[int, int, int]
    sliced: int

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray, native: bool) -> SliceOrientation:
        """The orientation for a scan.

        Args:
            shape: Of the scan, (i, j, k).
            affine: Of the scan.
            native: Slice along the third axis of the scan, as a 2-D model must. Otherwise the scan is sliced along the
                one axis that is far shorter than the others, as that of a single slice is; or else axially, unless
                axial pixels are more than twice as long as wide, as in scans that were made of other slices: then along
                the third axis.
        """
        orientation = nib.orientations.io_orientation(affine)
        to = [int(o) for o in orientation[:, 0]]
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        own = {ras: spacing[axis] for axis, ras in enumerate(to)}
        oblong = max(own[0], own[1]) > OBLONG * min(own[0], own[1])
        short, middle = np.argsort(shape, kind="stable")[:2]
        sliced = to[2] if native or oblong else 2
        if not native and FLAT * shape[short] < shape[middle]:
            sliced = to[short]
        order = [ras for ras in range(3) if ras != sliced] + [sliced]
        a, b, c = (to.index(ras) for ras in order)
        flips = [bool(orientation[axis, 1] < 0) for axis in (a, b, c)]
        return cls((a, b, c), (flips[0], flips[1], flips[2]), (shape[0], shape[1], shape[2]), sliced)

    def view(self, array: np.ndarray) -> np.ndarray:
        """The array of a scan as a sliced volume; writing into the view writes into the array."""
        return array.transpose(self.axes)[tuple(slice(None, None, -1 if f else 1) for f in self.flipped)]

    def of_working(self, array: np.ndarray) -> np.ndarray:
        """An array on the working grid (RAS axes) with the sliced axis last."""
        return array.transpose([ras for ras in range(3) if ras != self.sliced] + [self.sliced])

    def points(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (n, 3) of the scan to those of the sliced volume."""
        moved = np.asarray(voxels, np.int64).reshape(-1, 3)[:, self.axes]
        size = np.array(self.shape)[list(self.axes)]
        return np.where(self.flipped, size - 1 - moved, moved)

    def prompt(self, prompt: ClientPrompt) -> ClientPrompt:
        """A prompt in voxels of the scan to one in voxels of the sliced volume."""
        box, at = prompt.box, prompt.slice
        if box is not None:
            low, high = np.sort(self.points(np.array(box).T), 0).tolist()
            box = ((low[0], high[0]), (low[1], high[1]), (low[2], high[2]))
        if at is not None:  # clients count along the third axis of the scan, which need not be the one that is sliced
            mirrored = self.shape[2] - 1 - at if self.flipped[2] else at
            at = mirrored if self.axes[2] == 2 else None
        foreground, background = self.points(prompt.foreground), self.points(prompt.background)
        return replace(prompt, foreground=foreground, background=background, box=box, slice=at)

    def scan_slice(self, k: int) -> int:
        """The index along ``axes[2]`` of the scan that is slice k of the sliced volume."""
        return self.shape[self.axes[2]] - 1 - k if self.flipped[2] else k


@dataclass(frozen=True)
class OpenScan:
    """A scan in memory.

    Attributes:
        key: Path and state of its file.
        affine: Of the scan.
        source: Its slices.
        orientation: From the scan to the slices and back.
    """

    key: tuple[object, ...]
    affine: np.ndarray
    source: SliceSource
    orientation: SliceOrientation


@dataclass(frozen=True, eq=False)
class _ReadScan:
    """The voxels of a scan, and the scan opened with and without ``native``."""

    array: np.ndarray
    affine: np.ndarray
    window: tuple[float, float]
    opened: dict[bool, OpenScan] = field(default_factory=dict)


class ScanCache:
    """The last few scans, bounded by memory; a file that changes on disk is read again.

    Args:
        settings: Window and size limit.
        limit: Bytes after which the least recently used scans are dropped.
    """

    def __init__(self, settings: Settings, limit: int = KEPT_BYTES) -> None:
        self.settings = settings
        self._scans: ByteLRU[tuple[object, ...], _ReadScan] = ByteLRU(limit, lambda s: sum(r.array.nbytes for r in s))
        self._lock, self._reading = threading.Lock(), threading.Lock()

    @property
    def bytes(self) -> int:
        """Memory of the scans."""
        return self._scans.bytes

    def open(self, path: Path, native: bool = False) -> OpenScan:
        """Read a scan, or find it again.

        Args:
            path: The scan.
            native: As :meth:`SliceOrientation.of`.

        Raises:
            BadImageError: As :func:`aslseg.volume.io.read_image`, or the file changed while it was read.
        """
        key = (str(path), FileStamp.of(path))
        with self._lock:
            found = self._find(key, native)
        if found is None:
            with self._reading:  # two readers of one file would read it twice
                with self._lock:
                    found = self._find(key, native)
                if found is None:
                    found = self._load(path, key, native)
        return found

    def _find(self, key: tuple[object, ...], native: bool) -> OpenScan | None:
        found = self._scans.get(key)
        if found is None:
            return None
        if native not in found.opened:
            orientation = SliceOrientation.of(found.array.shape, found.affine, native)
            source = SliceSource(orientation.view(found.array), found.window)
            found.opened[native] = OpenScan(key, found.affine, source, orientation)
        return found.opened[native]

    def _load(self, path: Path, key: tuple[object, ...], native: bool) -> OpenScan:
        volume = read_image(path, self.settings.max_voxels)
        if (str(path), FileStamp.of(path)) != key:
            raise BadImageError(f"{path.name}: changed on disk while it was read; try again")
        window = window_of(volume.array, self.settings)
        with self._lock:
            for old in [k for k in self._scans.keys() if k[0] == key[0]]:  # noqa: SIM118 - no mapping
                self._scans.pop(old)
            self._scans.put(key, _ReadScan(volume.array, volume.affine, window))
            found = self._find(key, native)
        assert found is not None  # noqa: S101 - the newest entry of a ByteLRU stays
        return found
