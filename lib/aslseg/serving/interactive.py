"""The model `sam`: an annotator's clicks and box to the whole object in 3-D."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferType

from aslseg.prompts.from_client import ClientPrompt, parse
from aslseg.serving.cascade import Scan, Scans
from aslseg.serving.infer import MaskTask
from aslseg.volume.geometry import Grid


class ClickTask(MaskTask):
    """Whole object in 3-D, value 1, replaced at every click; usable before anything is trained.

    Args:
        scans: Shared with the other models.
        description: Shown to annotators.
    """

    def __init__(self, scans: Scans, description: str) -> None:
        super().__init__(scans, "sam", (), description)
        self.type = InferType.DEEPGROW
        # one click at a time on SAM; whole-volume stages do not hold this
        self._clicking = threading.Lock()

    def is_valid(self) -> bool:
        """Shown as long as there is a SAM: a published one, the one of the settings, or the one that ships."""
        from aslseg.sam.build import base_path

        models = self.scans.models
        return models.published("sam") is not None or base_path(models.settings).is_file()

    def result_labels(self, request: Mapping[str, Any]) -> dict[str, int]:
        """The one object, under the name that the client gave."""
        return {str(request.get("label") or next(iter(self.scans.models.settings.label_set.values))): 1}

    def mask(
        self, path: Path, request: Mapping[str, Any], times: dict[str, float]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As :meth:`aslseg.serving.infer.MaskTask.mask`; without clicks SAM's redrawing of the automatic mask."""
        scan = self.scans.open(path, times)
        prompt = parse(request, scan.grid.native_shape)
        names = self.scans.models.settings.label_set.names
        region = names.index(prompt.label) if prompt.label in names else 0
        more: dict[str, Any] = {"notes": list(prompt.notes)}
        if prompt.empty:
            found = self._automatic(scan, region, times)
            more["source"] = "automatic mask" if found.any() else "nothing clicked"
        else:
            found = self._clicked(scan, prompt, region, times)
            more["source"] = "clicks"
        start = time.perf_counter()
        native = (scan.grid.to_native(found.astype(np.float32)) >= 0.5).astype(np.uint8)
        times["post"] = time.perf_counter() - start
        # a click is a promise: the voxel itself is in, however coarse the working grid
        if not prompt.empty:
            native[tuple(prompt.foreground.T)] = 1
            native[tuple(prompt.background.T)] = 0
        return native, scan.grid.affine, more

    def _automatic(self, scan: Scan, region: int, times: dict[str, float]) -> np.ndarray:
        if self.scans.models.published("ssl") is None:
            return np.zeros(scan.image.shape, np.float32)
        return self.scans.stage(scan, "sam", times)[region]

    def _clicked(self, scan: Scan, prompt: ClientPrompt, region: int, times: dict[str, float]) -> np.ndarray:
        from aslseg.sam.interactive import Clicks

        # an automatic mask that the annotator has asked for is what the clicks correct
        known = scan.regions.get("ssl") if prompt.label in self.scans.models.settings.label_set.names else None
        model = self.scans.models.get("sam")
        with self._clicking:
            start = time.perf_counter()
            clicks = Clicks(model, scan.image, self.scans.models.settings, None if known is None else known[region])
            found = clicks.answer(to_working(prompt, scan.grid))
            times["infer"] = time.perf_counter() - start
        return found


def to_working(prompt: ClientPrompt, grid: Grid) -> ClientPrompt:
    """A prompt in voxels of the scan to one in voxels of its working grid."""
    box = prompt.box
    if box is not None:
        ends = _moved(np.array(box).T, grid)
        low, high = np.sort(ends, 0)
        box = tuple((int(a), int(b)) for a, b in zip(low, high, strict=True))  # type: ignore[assignment]
    foreground, background = _moved(prompt.foreground, grid), _moved(prompt.background, grid)
    clicked = foreground if len(foreground) else background
    middle = (box[2][0] + box[2][1]) // 2 if box else None
    # the slice is counted along the scan's own third axis, which need not be the working grid's
    at = int(clicked[-1, 2]) if len(clicked) else middle
    return replace(prompt, foreground=foreground, background=background, box=box, slice=at)


def _moved(voxels: np.ndarray, grid: Grid) -> np.ndarray:
    """Voxel indices (n, 3) of the scan to indices of the working grid, int64, inside it."""
    out = np.zeros((len(voxels), 3), np.int64)
    for axis, (canonical, direction) in enumerate(nib.orientations.io_orientation(grid.affine)):
        to = int(canonical)
        along = voxels[:, axis] if direction > 0 else grid.native_shape[axis] - 1 - voxels[:, axis]
        scaled = (along + 0.5) * grid.shape[to] / grid.canonical_shape[to] - 0.5
        out[:, to] = np.rint(scaled).clip(0, grid.shape[to] - 1)
    return out
