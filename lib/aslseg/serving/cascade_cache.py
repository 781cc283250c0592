"""A scan through the published models, each stage computed once and kept while scan and models stay the same."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aslseg.cases.prepare import prepare, working_spacing
from aslseg.errors import NoModelError
from aslseg.files import FileStamp
from aslseg.models.loaded import Kind, Models
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.io import read_image

KEPT_BYTES = 1_500_000_000


@dataclass
class CachedScan:
    """A scan on the working grid and what the stages made of it.

    Attributes:
        key: Its file as it was, and the published models.
        image: (i, j, k) float32 in 0..1 on the working grid.
        grid: The way back.
        regions: Stage to region probabilities (N, i, j, k), float32.
        notes: What was given up for lack of memory, for the client.
        lock: Held while a stage is computed, so that equal requests compute it once.
    """

    key: tuple[object, ...]
    image: np.ndarray
    grid: Grid
    regions: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bytes(self) -> int:
        """Memory held by the arrays."""
        return self.image.nbytes + sum(r.nbytes for r in self.regions.values())


class CascadeCache:
    """The last few scans with their stages, bounded by memory.

    Args:
        models: Published models.
        limit: Bytes after which the oldest scans are let go.
    """

    def __init__(self, models: Models, limit: int = KEPT_BYTES) -> None:
        self.models, self.limit = models, limit
        self._scans: OrderedDict[tuple[object, ...], CachedScan] = OrderedDict()
        self._lock = threading.Lock()
        # whole-volume stages share the processor; a click must not wait behind two of them at once
        self._computing = threading.Lock()

    def open(self, path: Path, times: dict[str, float] | None = None) -> CachedScan:
        """Read and prepare a scan, or find it again.

        Raises:
            BadImageError: As :func:`aslseg.volume.io.read_image`.
        """
        key = self._key(path)
        with self._lock:
            if key in self._scans:
                self._scans.move_to_end(key)
                return self._scans[key]
        start = time.perf_counter()
        volume = read_image(path, self.models.settings.max_voxels)
        image, grid = prepare(volume, self.models.settings, self._spacing(volume))
        if times is not None:
            times["pre"] = time.perf_counter() - start
        with self._lock:
            scan = self._scans.setdefault(key, CachedScan(key, image, grid))
            self._trim(scan)
        return scan

    def known(self, path: Path, kind: Kind) -> tuple[tuple[object, ...], np.ndarray] | None:
        """A stage's regions (N, i, j, k) if they are in memory, after a name for them; never computes."""
        key = self._key(path)
        with self._lock:
            scan = self._scans.get(key)
        regions = scan.regions.get(kind) if scan else None
        return None if regions is None else (key, regions)

    def _key(self, path: Path) -> tuple[object, ...]:
        return str(path), FileStamp.of(path), tuple(sorted(self.models.hashes().items()))

    def stage(self, scan: CachedScan, kind: Kind, times: dict[str, float] | None = None) -> np.ndarray:
        """Region probabilities (N, i, j, k) of a stage on the working grid; earlier stages are computed as needed.

        Raises:
            NoModelError: A stage has no published model.
        """
        with scan.lock, self._computing:
            found = self._stage(scan, kind, {} if times is None else times)
        with self._lock:
            self._trim(scan)
        return found

    def _stage(self, scan: CachedScan, kind: Kind, times: dict[str, float]) -> np.ndarray:
        if kind not in scan.regions:
            needed = {"ssl": (), "sam": ("ssl",), "adapter": ("sam", "ssl")}[kind]
            before = [self._stage(scan, earlier, times) for earlier in needed]  # type: ignore[arg-type]
            start = time.perf_counter()
            scan.regions[kind] = self._compute(kind, scan, *before)
            times[kind] = time.perf_counter() - start
        return scan.regions[kind]

    def _compute(self, kind: Kind, scan: CachedScan, *before: np.ndarray) -> np.ndarray:
        settings, model = self.models.settings, self.models.get(kind)
        if kind == "ssl":
            found = model.run(scan.image, regions=True)
            scan.notes = found.notes
            return found.values
        if kind == "adapter":
            return model.predict(scan.image, *before)
        from aslseg.sam.predictor.predict import redraw

        return redraw(model, scan.image, before[0], settings)

    def adapt(self, scan: CachedScan, given: np.ndarray) -> np.ndarray:
        """The adaptation network on a mask that a client sent instead of SAM's.

        Args:
            scan: The scan.
            given: Region masks (N, i, j, k) on the working grid, 0..1.
        """
        ssl = self.stage(scan, "ssl")
        with self._computing:
            return self.models.get("adapter").predict(scan.image, given.astype(np.float32), ssl)

    def _spacing(self, volume: Volume) -> tuple[float, float, float] | None:
        """The working spacing of the published models; before there are any, that of the settings."""
        for kind in ("ssl", "sam"):
            try:
                model = self.models.get(kind)
            except NoModelError:
                continue
            if "spacing" in model.metadata:
                stored = model.metadata["spacing"]
                return tuple(stored) if stored else None
        return working_spacing([volume], self.models.settings)

    def _trim(self, newest: CachedScan) -> None:
        while sum(s.bytes for s in self._scans.values()) > self.limit and len(self._scans) > 1:
            oldest = next(k for k, s in self._scans.items() if s is not newest)
            del self._scans[oldest]
