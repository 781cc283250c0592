"""Scans opened for clicks: their own voxels, turned so that SAM sees what it was trained on, and back."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from aslseg.errors import BadImageError
from aslseg.files import FileStamp
from aslseg.prompts.from_client import ClientPrompt
from aslseg.sam.predictor.slices import SliceSource
from aslseg.settings import Settings
from aslseg.volume.intensity import window_of
from aslseg.volume.io import read_image

KEPT_BYTES = 1_500_000_000
MOST_FLAT = 8  # times as long as the shortest axis; beyond, the scan is a few slices along that one
MOST_OBLONG = 2.0  # pixels of an axial slice; beyond, the scan was not made of axial slices


@dataclass(frozen=True)
class SliceOrientation:
    """Between a scan's array and a picture: RAS-closest axes, of which the sliced one comes last. Nothing is resampled.

    Attributes:
        axes: For each axis of the picture, the scan's.
        flipped: Whether the scan's axis runs the other way.
        shape: Of the scan.
        sliced: RAS axis that is sliced: 2 is axial.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    shape: tuple[int, int, int]
    sliced: int

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray, native: bool) -> SliceOrientation:
        """For a scan.

        Args:
            shape: Its shape (i, j, k).
            affine: Its affine.
            native: Slice along its own third axis, as a 2-D model must. Otherwise along the one axis that is far
                shorter than the others, as of a single slice; or else axially, unless axial pixels are more than twice
                as long as wide, as in scans that were made of other slices: then along the third axis.
        """
        orientation = nib.orientations.io_orientation(affine)
        to = [int(o) for o in orientation[:, 0]]
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        own = {ras: spacing[axis] for axis, ras in enumerate(to)}
        oblong = max(own[0], own[1]) > MOST_OBLONG * min(own[0], own[1])
        short, middle = np.argsort(shape, kind="stable")[:2]
        sliced = to[2] if native or oblong else 2
        if not native and MOST_FLAT * shape[short] < shape[middle]:
            sliced = to[short]
        order = [ras for ras in range(3) if ras != sliced] + [sliced]
        a, b, c = (to.index(ras) for ras in order)
        flips = [bool(orientation[axis, 1] < 0) for axis in (a, b, c)]
        return cls((a, b, c), (flips[0], flips[1], flips[2]), (shape[0], shape[1], shape[2]), sliced)

    def view(self, array: np.ndarray) -> np.ndarray:
        """A scan's array as the picture has it; writing into the view writes into the array."""
        return array.transpose(self.axes)[tuple(slice(None, None, -1 if f else 1) for f in self.flipped)]

    def of_working(self, array: np.ndarray) -> np.ndarray:
        """A working grid's array (RAS axes) with the sliced axis last."""
        return array.transpose([ras for ras in range(3) if ras != self.sliced] + [self.sliced])

    def points(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (n, 3) of the scan to the picture's."""
        moved = np.asarray(voxels, np.int64).reshape(-1, 3)[:, self.axes]
        size = np.array(self.shape)[list(self.axes)]
        return np.where(self.flipped, size - 1 - moved, moved)

    def prompt(self, prompt: ClientPrompt) -> ClientPrompt:
        """A prompt in voxels of the scan to one in voxels of the picture."""
        box, at = prompt.box, prompt.slice
        if box is not None:
            low, high = np.sort(self.points(np.array(box).T), 0).tolist()
            box = ((low[0], high[0]), (low[1], high[1]), (low[2], high[2]))
        if at is not None:  # it counts along the scan's third axis, which need not be the one that is sliced
            mirrored = self.shape[2] - 1 - at if self.flipped[2] else at
            at = mirrored if self.axes[2] == 2 else None
        foreground, background = self.points(prompt.foreground), self.points(prompt.background)
        return ClientPrompt(foreground, background, box, at, prompt.label, prompt.classes, prompt.notes)


@dataclass(frozen=True)
class OpenScan:
    """A scan in memory.

    Attributes:
        key: Its file as it was.
        affine: Of the scan.
        picture: Its slices.
        turn: The way there and back.
    """

    key: tuple[object, ...]
    affine: np.ndarray
    picture: SliceSource
    turn: SliceOrientation


class ScanCache:
    """The last few scans, bounded by memory; a file that changes on disk is read again.

    Args:
        settings: Window and size limit.
        limit: Bytes after which the oldest scans are let go.
    """

    def __init__(self, settings: Settings, limit: int = KEPT_BYTES) -> None:
        self.settings, self.limit = settings, limit
        self._read: OrderedDict[tuple[object, ...], tuple[np.ndarray, np.ndarray, tuple[float, float]]] = OrderedDict()
        self._opened: dict[tuple[object, ...], OpenScan] = {}
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def open(self, path: Path, native: bool = False) -> OpenScan:
        """Read a scan, or find it again.

        Args:
            path: The scan.
            native: As :meth:`Turn.of`.

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
        if key not in self._read:
            return None
        self._read.move_to_end(key)
        if (key, native) not in self._opened:
            array, affine, window = self._read[key]
            turn = SliceOrientation.of(array.shape, affine, native)
            self._opened[key, native] = OpenScan(key, affine, SliceSource(turn.view(array), window), turn)
        return self._opened[key, native]

    def _load(self, path: Path, key: tuple[object, ...], native: bool) -> OpenScan:
        volume = read_image(path, self.settings.max_voxels)
        if (str(path), FileStamp.of(path)) != key:
            raise BadImageError(f"{path.name}: changed on disk while it was read; try again")
        window = window_of(volume.array, self.settings)
        with self._lock:
            for old in [k for k in self._read if k[0] == key[0]]:
                self._forget(old)
            self._read[key] = volume.array, volume.affine, window
            while sum(a.nbytes for a, _, _ in self._read.values()) > self.limit and len(self._read) > 1:
                self._forget(next(iter(self._read)))
            found = self._find(key, native)
        assert found is not None  # noqa: S101 - it was put there under this lock
        return found

    def _forget(self, key: tuple[object, ...]) -> None:
        del self._read[key]
        self._opened.pop((key, False), None)
        self._opened.pop((key, True), None)
