"""Scans with what the published models make of them, kept in memory while scan and models stay the same."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aslseg.cases.prepare import Spacing, working_spacing
from aslseg.compute.byte_lru import ByteLRU
from aslseg.errors import NoModelError
from aslseg.files import FileStamp
from aslseg.models.cascade import CascadeInput, StageOutput, compute, compute_chain
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.io import read_image

LIMIT_BYTES = 1_500_000_000


@dataclass
class CachedScan:
    """A scan on the working grid and the results of the stages.

    Attributes:
        key: The state of its file, and the hashes of the published models.
        given: The scan as the stages are given it.
        stages: Results by stage.
        lock: Held while a stage is computed, so that simultaneous requests compute it once.
    """

    key: tuple[object, ...]
    given: CascadeInput
    stages: dict[ModelKind, StageOutput] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def grid(self) -> Grid:
        """Between the working grid and the scan's own."""
        return self.given.grid

    @property
    def notes(self) -> tuple[str, ...]:
        """What was given up for lack of memory, for the client."""
        return tuple(note for output in list(self.stages.values()) for note in output.notes)

    @property
    def bytes(self) -> int:
        """Memory that the arrays take."""
        return self.given.image.nbytes + sum(output.regions.nbytes for output in list(self.stages.values()))


class CascadeCache:
    """The scans that were used last, with the results of their stages, limited in bytes.

    Args:
        models: Published models.
        limit: Bytes above which the scans used longest ago are dropped.
    """

    def __init__(self, models: Models, limit: int = LIMIT_BYTES) -> None:
        self.models = models
        self._scans: ByteLRU[tuple[object, ...], CachedScan] = ByteLRU(limit, lambda scans: sum(s.bytes for s in scans))
        self._lock = threading.Lock()
        # stages on whole volumes share the processor; with two at once clicks would be slow
        self._computing = threading.Lock()

    @property
    def bytes(self) -> int:
        """Memory of all scans and stages."""
        return self._scans.bytes

    def open(self, path: Path, times: dict[str, float] | None = None) -> CachedScan:
        """Read and prepare a scan, unless it is in memory.

        Args:
            path: The scan.
            times: Gets the seconds under ``pre`` if it was read.

        Raises:
            BadImageError: As :func:`aslseg.volume.io.read_image`.
        """
        key = self._key(path)
        found = self._scans.get(key)
        if found is not None:
            return found
        start, settings = time.perf_counter(), self.models.settings

        def load() -> Volume:
            return read_image(path, settings.max_voxels)

        volume = load()
        given = CascadeInput.from_volume(volume, settings, self._spacing(volume), load)
        if times is not None:
            times["pre"] = time.perf_counter() - start
        with self._lock:
            scan = self._scans.get(key) or CachedScan(key, given)
            self._scans.put(key, scan)
        return scan

    def known(self, path: Path, kind: ModelKind) -> tuple[tuple[object, ...], np.ndarray] | None:
        """The scan's key and a stage's regions (N, i, j, k), if they are in memory; computes nothing."""
        key = self._key(path)
        scan = self._scans.get(key)
        output = scan.stages.get(kind) if scan else None
        return None if output is None else (key, output.regions)

    def stage(self, scan: CachedScan, kind: ModelKind, times: dict[str, float] | None = None) -> np.ndarray:
        """Region probabilities (N, i, j, k) of a stage on the working grid, computed with what they need if missing.

        Args:
            scan: From :meth:`open`.
            kind: The stage.
            times: Gets the seconds of each stage that was computed.

        Raises:
            NoModelError: A stage has no published model.
        """
        with scan.lock, self._computing:
            output = compute_chain(kind, self.models.get, scan.given, self.models.settings, scan.stages, times)
        self._scans.put(scan.key, scan)
        return output.regions

    def adapt(self, scan: CachedScan, drawn: np.ndarray) -> np.ndarray:
        """Run the adaptation network on a client's mask in place of SAM's.

        Args:
            scan: From :meth:`open`.
            drawn: Region masks (N, i, j, k) on the working grid, 0..1.

        Returns:
            Region probabilities (N, i, j, k) on the working grid.

        Raises:
            NoModelError: No SSL model or no adaptation network is published.
        """
        before = {ModelKind.SSL: self.stage(scan, ModelKind.SSL), ModelKind.SAM: drawn.astype(np.float32)}
        with self._computing:
            model = self.models.get(ModelKind.ADAPTER)
            return compute(ModelKind.ADAPTER, model, scan.given, before, self.models.settings).regions

    def _key(self, path: Path) -> tuple[object, ...]:
        return str(path), FileStamp.of(path), tuple(sorted(self.models.hashes().items()))

    def _spacing(self, volume: Volume) -> Spacing:
        """The working spacing of the published models; that of the settings while nothing is published."""
        for kind in (ModelKind.SSL, ModelKind.SAM):
            try:
                model = self.models.get(kind)
            except NoModelError:
                continue
            if "spacing" in model.metadata:
                stored = model.metadata["spacing"]
                return tuple(stored) if stored else None
        return working_spacing([volume], self.models.settings)
