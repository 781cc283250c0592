"""Two streams of training patches, each step a pure function of (seed, step), so that a resumed run is the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from aslseg.cases.prepared_case import Prepared

FOREGROUND_PART = 0.5
HUMAN_PART = 0.5
KEPT_VOXELS = 4000


@dataclass(frozen=True)
class Patch:
    """One crop: image (i, j, k) float32 in 0..1, class map uint8, voxel weights float32.

    NumPy arrays; tensors on the device that the case is held on
    (:func:`aslseg.cases.prepared_case.load_within_budget`).
    """

    image: Any
    label: Any
    weight: Any


class PatchSampler:
    """Draws patches from cases on the working grid.

    Half of the labelled patches are centred on a voxel of a random foreground class, so that small lesions are seen;
    the rest lie anywhere. Where promoted cases are present, half of the labelled patches still come from human labels.

    Args:
        cases: Labelled cases, or unlabelled ones (label None).
        patch: Patch shape in voxels; smaller scans are padded with zeros of weight 0.
        classes: Number of foreground classes.

    Attributes:
        holding: Value of each class that any case holds to the numbers of these cases.
    """

    def __init__(self, cases: Sequence[Prepared], patch: Sequence[int], classes: int) -> None:
        self.cases = list(cases)
        self.patch = tuple(patch)
        self.human = [n for n, c in enumerate(self.cases) if c.voxel_weight is None]
        self.promoted = [n for n, c in enumerate(self.cases) if c.voxel_weight is not None]
        fixed = np.random.default_rng(0)
        # values above the number of classes are "a label, or anything nested in it"
        self.foreground = [{} if c.label is None else _class_voxels(c.label, 2 * classes, fixed) for c in self.cases]
        holding = {
            value: [n for n, found in enumerate(self.foreground) if value in found] for value in range(1, classes + 1)
        }
        self.holding = {value: numbers for value, numbers in holding.items() if numbers}

    def draw_batch(self, rng: np.random.Generator, count: int, around: Sequence[int] = ()) -> list[Patch]:
        """The patches of a batch, the first of them around a voxel of each of some classes that cases hold."""
        return [self._of_class(value, rng) for value in around] + [self.draw(rng) for _ in range(count - len(around))]

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
            return self._around(case, foreground[values[int(rng.integers(len(values)))]], rng)
        start = np.array([int(rng.integers(0, max(s - p, 0) + 1)) for s, p in zip(shape, self.patch, strict=True)])
        return self._crop(case, start)

    def _of_class(self, value: int, rng: np.random.Generator) -> Patch:
        """A patch around a voxel of a class; the case is drawn first."""
        human, promoted = ([n for n in group if n in self.holding[value]] for group in (self.human, self.promoted))
        group = human or promoted
        if human and promoted and rng.random() >= HUMAN_PART:
            group = promoted
        n = group[int(rng.integers(len(group)))]
        return self._around(self.cases[n], self.foreground[n][value], rng)

    def _around(self, case: Prepared, voxels: np.ndarray, rng: np.random.Generator) -> Patch:
        """A patch with one of the voxels (flat indices) near its middle."""
        centre = np.array(np.unravel_index(voxels[int(rng.integers(len(voxels)))], case.image.shape))
        jitter = [int(rng.integers(-(p // 4), p // 4 + 1)) for p in self.patch]
        return self._crop(case, centre - np.array(self.patch) // 2 + jitter)

    def _crop(self, case: Prepared, start: np.ndarray) -> Patch:
        shape, patch = np.array(case.image.shape), np.array(self.patch)
        start = fit_start(start, shape, patch)
        inside = tuple(slice(max(s, 0), min(s + p, n)) for s, p, n in zip(start, patch, shape, strict=True))
        pad = [(int(max(-s, 0)), int(max(s + p - n, 0))) for s, p, n in zip(start, patch, shape, strict=True)]
        image = _padded(_float(case.image[inside]), pad)
        label = np.zeros(1, np.uint8) if case.label is None else _padded(case.label[inside], pad)
        if case.voxel_weight is None:
            inner = _full([s.stop - s.start for s in inside], case.weight, case.image)
        else:
            inner = case.weight * _float(case.voxel_weight[inside])
        return Patch(image, label, _padded(inner, pad))


class RareClassSampler(PatchSampler):
    """Draws batches in which rare classes are present, also where few of many scans have them.

    At least one patch of each batch lies around a voxel of each rare class that any case holds (as many classes as
    there are patches, in random order). The other patches are drawn as by :class:`PatchSampler`.

    Args:
        cases, patch, classes: As for :class:`PatchSampler`.
        rare: Values of the rare classes.
    """

    def __init__(self, cases: Sequence[Prepared], patch: Sequence[int], classes: int, rare: Sequence[int]) -> None:
        super().__init__(cases, patch, classes)
        self.rare = [value for value in rare if value in self.holding]

    def draw_batch(self, rng: np.random.Generator, count: int, around: Sequence[int] = ()) -> list[Patch]:
        """The patches of a batch."""
        return super().draw_batch(
            rng, count, around or [self.rare[int(n)] for n in rng.permutation(len(self.rare))[:count]]
        )


def fit_start(start: np.ndarray, shape: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Move the first voxel of a patch so that the patch lies in the volume; a smaller volume lies in its middle.

    Args:
        start, shape, patch: Voxels along each axis, (3,).
    """
    return np.where(shape > patch, np.clip(start, 0, np.maximum(shape - patch, 0)), -((patch - shape) // 2))


def _float(volume: Any) -> Any:
    return volume.float() if isinstance(volume, torch.Tensor) else np.asarray(volume, np.float32)


def _full(shape: list[int], value: float, volume: Any) -> Any:
    if isinstance(volume, torch.Tensor):
        return torch.full(shape, value, device=volume.device)
    return np.full(shape, value, np.float32)


def _padded(volume: Any, pad: list[tuple[int, int]]) -> Any:
    if isinstance(volume, torch.Tensor):
        # torch counts axes from the last one
        return F.pad(volume, [n for pair in reversed(pad) for n in pair])
    return np.pad(np.asarray(volume), pad)


def _class_voxels(label: Any, classes: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """At most 4000 random voxels (flat indices) of each class that is there.

    Read slab by slab: a list of all foreground voxels of a large scan takes more memory than its label.
    """
    label = label.cpu().numpy() if isinstance(label, torch.Tensor) else label
    slabs = [np.bincount(np.ravel(slab), minlength=classes + 1)[: classes + 1] for slab in label]
    counts = np.array(slabs, np.int64).reshape(len(slabs), classes + 1)
    found = {}
    for value in range(1, classes + 1):
        ends = np.cumsum(counts[:, value])
        if not len(ends) or not ends[-1]:
            continue
        chosen = rng.choice(int(ends[-1]), min(int(ends[-1]), KEPT_VOXELS), replace=False)
        found[value] = np.empty(len(chosen), np.int64)
        slab_of = np.searchsorted(ends, chosen, side="right")
        for slab in np.unique(slab_of):
            here = slab_of == slab
            voxels = np.flatnonzero(label[slab] == value)
            found[value][here] = voxels[chosen[here] - (ends[slab] - counts[slab, value])] + slab * label[slab].size
    return found
