"""Cases on the working grid, and how many of them are held in memory or on a GPU; the others stay memory-mapped."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from aslseg.volume.geometry import Grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A case on the working grid: canonical (RAS) axes, working spacing, intensities in 0..1.

    Attributes:
        id, patient: As in :class:`aslseg.cases.studies.Case`.
        image: (i, j, k) float32 in 0..1.
        grid: Between the working grid and the scan's own.
        label: (i, j, k) uint8 class map, or None.
        weight: Weight of this case in the loss (1 for human labels).
        voxel_weight: (i, j, k) float16 weights in 0..1, or None for 1 everywhere.
        relative: Whether the intensities are relative to a parent's, as the second stage of nested labels sees them
            (:func:`aslseg.ssl.nested.view_case`).
        image_hash: SHA-256 of the scan's file; empty where there is none.
        label_hash: SHA-256 of the human label's file; empty without one.
    """

    id: str
    patient: str
    image: np.ndarray
    grid: Grid
    label: np.ndarray | None = None
    weight: float = 1.0
    voxel_weight: np.ndarray | None = field(default=None, repr=False)
    relative: bool = False
    image_hash: str = ""
    label_hash: str = ""


def human_labelled(cases: Sequence[Prepared]) -> Sequence[Prepared]:
    """The cases with a human label, which are those without ``voxel_weight``; all where there are none."""
    return [c for c in cases if c.voxel_weight is None] or cases


def arrays(case: Prepared) -> dict[str, np.ndarray]:
    """The NumPy arrays of a case by field name."""
    values = {f.name: getattr(case, f.name) for f in fields(case)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def backing_file(array: np.ndarray) -> Path | None:
    """The ``.npy`` file of an array that maps the whole file; None for any other array."""
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and str(array.filename).endswith(".npy"):
        return Path(str(array.filename))
    return None


def load_within_budget(cases: Sequence[Prepared], budget: float, device: torch.device | None = None) -> list[Prepared]:
    """Copy cases from disk into memory, or to a device as tensors, as far as the budget allows.

    Values and types do not change, so that training does not depend on the budget. A case that does not fit is left
    where it is; smaller ones after it may still fit.

    Args:
        cases: The most important ones first.
        budget: Bytes. In memory, arrays that are not memory-mapped to begin with count first.
        device: Where to copy to; None is the memory of the CPU.
    """

    def movable(case: Prepared) -> dict[str, np.ndarray]:
        return {k: a for k, a in arrays(case).items() if device is not None or isinstance(a, np.memmap)}

    def moved(array: np.ndarray) -> Any:
        copy = np.array(array)
        if device is None:
            return copy
        import torch

        return torch.from_numpy(copy).to(device)

    there = [a for c in cases for k, a in arrays(c).items() if k not in movable(c)]
    left = budget - sum(a.nbytes for a in there)
    out, passed = [], []
    for case in cases:
        wanted = movable(case)
        size = sum(a.nbytes for a in wanted.values())
        if size <= left:
            left -= size
            case = replace(case, **{k: moved(a) for k, a in wanted.items()})
        elif wanted:
            passed.append(case.id)
        out.append(case)
    logger.info(
        "%d of %d cases in memory%s, %.2f of %.2f GB used%s",
        len(cases) - len(passed),
        len(cases),
        f" of {device}" if device is not None else "",
        (budget - left) / 1e9,
        budget / 1e9,
        f"; left where they are: {', '.join(passed[:5])}{' ...' if len(passed) > 5 else ''}" if passed else "",
    )
    return out
