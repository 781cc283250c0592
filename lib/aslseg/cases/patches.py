"""Two streams of training patches, each step a pure function of (seed, step), so that a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aslseg.types import Prepared

FOREGROUND_PART = 0.5
HUMAN_PART = 0.5
KEPT_VOXELS = 4000


@dataclass(frozen=True)
class Patch:
    """One crop: image (i, j, k) float32 in 0..1, class map uint8, voxel weights float32."""

    image: np.ndarray
    label: np.ndarray
    weight: np.ndarray


class PatchSampler:
    """Draws patches from cases on the working grid.

    Half of the labelled patches are centred on a voxel of a random foreground class, so that small lesions are seen;
    the rest lie anywhere. Where promoted cases are present, half of the labelled patches still come from human labels.

    Args:
        cases: Labelled cases, or unlabelled ones (label None).
        patch: Patch shape in voxels; smaller scans are padded with zeros of weight 0.
        classes: Number of foreground classes.
    """

    def __init__(self, cases: Sequence[Prepared], patch: Sequence[int], classes: int) -> None:
        self.cases = list(cases)
        self.patch = tuple(patch)
        self.human = [n for n, c in enumerate(self.cases) if c.voxel_weight is None]
        self.promoted = [n for n, c in enumerate(self.cases) if c.voxel_weight is not None]
        fixed = np.random.default_rng(0)
        self.foreground = [
            {} if c.label is None else _class_voxels(np.asarray(c.label), classes, fixed) for c in self.cases
        ]

    def draw(self, rng: np.random.Generator) -> Patch:
        """One random patch."""
        group = self.human or self.promoted
        if self.human and self.promoted and rng.random() >= HUMAN_PART:
            group = self.promoted
        n = group[int(rng.integers(len(group)))]
        case, foreground = self.cases[n], self.foreground[n]
        shape = case.image.shape
        if foreground and rng.random() < FOREGROUND_PART:
            values = sorted(foreground)
            voxels = foreground[values[int(rng.integers(len(values)))]]
            centre = np.array(np.unravel_index(voxels[int(rng.integers(len(voxels)))], shape))
            jitter = [int(rng.integers(-(p // 4), p // 4 + 1)) for p in self.patch]
            start = centre - np.array(self.patch) // 2 + jitter
        else:
            start = np.array([int(rng.integers(0, max(s - p, 0) + 1)) for s, p in zip(shape, self.patch, strict=True)])
        return self._crop(case, start)

    def _crop(self, case: Prepared, start: np.ndarray) -> Patch:
        shape, patch = np.array(case.image.shape), np.array(self.patch)
        start = np.where(shape > patch, np.clip(start, 0, np.maximum(shape - patch, 0)), -((patch - shape) // 2))
        inside = tuple(slice(max(s, 0), min(s + p, n)) for s, p, n in zip(start, patch, shape, strict=True))
        pad = [(max(-s, 0), max(s + p - n, 0)) for s, p, n in zip(start, patch, shape, strict=True)]
        image = np.pad(np.asarray(case.image[inside], np.float32), pad)
        label = np.zeros(1, np.uint8) if case.label is None else np.pad(np.asarray(case.label[inside]), pad)
        if case.voxel_weight is None:
            inner = np.full([s.stop - s.start for s in inside], case.weight, np.float32)
        else:
            inner = case.weight * np.asarray(case.voxel_weight[inside], np.float32)
        return Patch(image, label, np.pad(inner, pad))


def _class_voxels(label: np.ndarray, classes: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    found = {}
    for value in range(1, classes + 1):
        voxels = np.flatnonzero(label == value)
        if voxels.size:
            found[value] = rng.choice(voxels, min(voxels.size, KEPT_VOXELS), replace=False)
    return found
