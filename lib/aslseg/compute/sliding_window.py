"""Sliding windows over a volume, finished slab by slab, so that memory does not grow with the volume's length.

Positions and weights of the windows are those of MONAI's ``sliding_window_inference``, and so are the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

SMALLEST = (32, 32, 16)
# three on a CPU, because even shares of three or fewer are never one (see Plan.least)
BATCHES = {"cpu": (3, 2), "cuda": (4, 2, 1)}
SHORTAGES = ("not enough memory", "out of memory", "can't allocate memory", "bad_alloc", "could not create a memory")

Where = tuple[slice, slice, slice]
Blend = Literal["gaussian", "constant"]


@dataclass(frozen=True)
class Plan:
    """How the network processes windows.

    Attributes:
        device: Device of the network.
        window: Size of a window in voxels (i, j, k), each a multiple of 16.
        batch: Windows processed at once.
    """

    device: torch.device
    window: tuple[int, int, int]
    batch: int

    @property
    def least(self) -> int:
        """Smallest batch to give to the network: on a CPU, torch is slower without oneDNN, as for a batch of one."""
        return 2 if self.device.type == "cpu" else 1

    def __str__(self) -> str:
        i, j, k = self.window
        return f"{self.batch} windows of {i} x {j} x {k} at once on {self.device}"


def plans(device: torch.device, window: tuple[int, int, int]) -> Iterator[Plan]:
    """The plan to begin with, and what to try when memory runs out: smaller batches, smaller windows, the CPU.

    Windows are halved along their longest axis, rounded down to multiples of 16, as far as (32, 32, 16).
    """
    for where in [device] if device.type == "cpu" else [device, torch.device("cpu")]:
        size, batches = list(window), BATCHES["cpu" if where.type == "cpu" else "cuda"]
        for batch in batches:
            yield Plan(where, window, batch)
        while any(n > least for n, least in zip(size, SMALLEST, strict=True)):
            axis = max((a for a in range(3) if size[a] > SMALLEST[a]), key=lambda a: size[a])
            size[axis] = max(size[axis] // 32 * 16, SMALLEST[axis])
            yield Plan(where, (size[0], size[1], size[2]), batches[-1])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, oneDNN or numpy says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in SHORTAGES)


def starts(extent: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along an axis that is no shorter than a window; the last one ends where it ends."""
    step = max(int(window * (1 - overlap)), 1)
    count = math.ceil((extent - window) / step) + 1
    return [min(n * step, extent - window) for n in range(count)]


def slabs(
    image: np.ndarray,
    network: Callable[[Tensor], Tensor],
    classes: int,
    plan: Plan,
    overlap: float,
    blend: Blend = "gaussian",
) -> Iterator[tuple[Where, Tensor]]:
    """Blended predictions of a volume in finished slabs across its longest axis, in order.

    Only one slab is in memory: (classes + 1) float32 values for each voxel of the volume's cross-section times a
    window's length.

    Args:
        image: (i, j, k), or (C, i, j, k); shorter than a window it is surrounded by zeros.
        network: Windows (B, C, i, j, k) float32 on the plan's device to what is blended (B, classes, i, j, k).
        classes: Channels of the network's output.
        plan: Window, batch and device.
        overlap: Fraction of a window's edge that its neighbour shares.
        blend: Weights that fall off from a window's middle, or the same weight everywhere.

    Yields:
        Where the slab lies in the volume, and its (classes, ...) float32 on the plan's device. The slabs cover the
        volume once.
    """
    window = plan.window
    image = image if image.ndim == 4 else image[None]
    size = image.shape[1:]
    shape = [max(n, w) for n, w in zip(size, window, strict=True)]
    offset = [(n - m) // 2 for n, m in zip(shape, size, strict=True)]
    starts_by_axis = [starts(n, w, overlap) for n, w in zip(shape, window, strict=True)]
    axis = int(np.argmax(shape))
    along, length, starts_by_axis[axis] = starts_by_axis[axis], window[axis], [0]
    weights = compute_importance_map(window, blend, device=plan.device)[None]
    total = torch.zeros(classes + 1, *shape[:axis], length, *shape[axis + 1 :], device=plan.device)
    windows = _Windows(network, plan)
    for first, following in zip(along, [*along[1:], shape[axis]], strict=True):
        origin = [-o for o in offset]
        origin[axis] += first
        for corner, found in windows.predicted(image, origin, list(product(*starts_by_axis))):
            part = total[:, *(slice(c, c + w) for c, w in zip(corner, window, strict=True))]
            part[:-1] += found * weights
            part[-1:] += weights
        done = following - first
        # what lies outside the volume is left behind
        thick = min(done, size[axis])
        kept = [slice(o, o + n) for o, n in zip(offset, size, strict=True)]
        where = [slice(0, n) for n in size]
        kept[axis], where[axis] = slice(offset[axis], offset[axis] + thick), slice(first, first + thick)
        finished = total[:, *kept]
        yield (where[0], where[1], where[2]), finished[:-1] / finished[-1]
        total = _moved(total, axis + 1, done)


def _moved(total: Tensor, axis: int, by: int) -> Tensor:
    """The sums for the next slab: shifted along the axis, with zeros where no window has been yet."""
    rest = total.shape[axis] - by
    if rest:
        total.narrow(axis, 0, rest).copy_(total.narrow(axis, by, rest).clone())
    total.narrow(axis, rest, by).zero_()
    return total


class _Windows:
    """Windows through the network in even batches; of successive ones that hold a single value (in each channel) only
    the first."""

    def __init__(self, network: Callable[[Tensor], Tensor], plan: Plan) -> None:
        self.network, self.plan = network, plan
        self.value, self.found = np.empty(0), torch.empty(0)

    def predicted(
        self, image: np.ndarray, origin: list[int], corners: list[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Corners with the predictions (classes, i, j, k) of their windows."""
        busy = []
        for corner in corners:
            cut = self._cut(image, origin, corner)
            value = cut[:, :1, :1, :1]
            if not (cut == value).all():
                busy.append(corner)
            else:
                if not np.array_equal(value, self.value):
                    self.value, self.found = value, self._predict([cut])[0]
                yield corner, self.found
        for share in np.array_split(np.arange(len(busy)), math.ceil(len(busy) / self.plan.batch)) if busy else ():
            some = [busy[n] for n in share]
            yield from zip(some, self._predict([self._cut(image, origin, c) for c in some]), strict=True)

    def _cut(self, image: np.ndarray, origin: list[int], corner: tuple[int, ...]) -> np.ndarray:
        out = np.zeros((len(image), *self.plan.window), np.float32)
        begin = [o + c for o, c in zip(origin, corner, strict=True)]
        edges = list(zip(begin, self.plan.window, image.shape[1:], strict=True))
        inside = [slice(max(b, 0), min(b + w, n)) for b, w, n in edges]
        out[:, *(slice(s.start - b, s.stop - b) for s, b in zip(inside, begin, strict=True))] = image[:, *inside]
        return out

    def _predict(self, cuts: list[np.ndarray]) -> Tensor:
        filled = cuts + cuts[:1] * (self.plan.least - len(cuts))
        return self.network(torch.from_numpy(np.stack(filled)).to(self.plan.device))[: len(cuts)]
