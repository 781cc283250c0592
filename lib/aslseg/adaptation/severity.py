"""How severe synthetic errors must be to have a wanted Dice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aslseg.adaptation.geometry_mm import Spacing, box_of
from aslseg.adaptation.synthetic import CONTEXT, LEAST_DRAWN, corrupt_region
from aslseg.compute.overlap import dice

LEAST, MOST = 0.02, 3.0
"""Range of the severities that :func:`calibrate` finds."""
CALIBRATION_DRAWS, CALIBRATED_VOXELS = 80, 40_000
"""Corrupted masks of each severity that it tries, and the size of their scans."""


class Truth(NamedTuple):
    """A true mask (i, j, k) bool, its image in 0..1 or None, and the spacing in mm."""

    mask: np.ndarray
    image: np.ndarray | None
    spacing: Spacing

    @classmethod
    def around(cls, mask: np.ndarray, image: np.ndarray | None, spacing: Spacing) -> Truth:
        """The part of a scan in which errors of a mask are made, coarsened to CALIBRATED_VOXELS by leaving out voxels.

        Errors have lengths in mm, so that their Dice hardly depends on the voxels' size. The mask holds something.
        """
        box = box_of(mask, CONTEXT, spacing)
        part, view, size = mask[box], None if image is None else image[box], list(spacing)
        while part.size > CALIBRATED_VOXELS:
            step = [1, 1, 1]
            step[int(np.argmin(size))] = 2
            thinned = tuple(slice(None, None, n) for n in step)
            if not part[thinned].any():
                break
            part, view = part[thinned], None if view is None else view[thinned]
            size[int(np.argmin(size))] *= 2
        # copies: a part of an array would keep the whole scan in memory
        return cls(part.copy(), None if view is None else view.copy(), (size[0], size[1], size[2]))


def calibrate(truths: Sequence[Truth], target: float, rng: np.random.Generator) -> float:
    """The ``most`` of :func:`draw_severity` at which the median Dice of corrupted masks meets ``target``.

    It matches the errors to those that SSL models make of labels that they were not trained on.

    Args:
        truths: Of one region.
        target: Wanted median Dice, in 0..1.
        rng: Seeds every trial alike, so that the search is monotone up to noise.

    Returns:
        LEAST to MOST, by bisection to 0.03 or to a Dice within 0.02; the nearer end if the target lies outside.
    """
    seed = int(rng.integers(2**31))
    low, high = LEAST, MOST
    while high - low > 0.03:
        middle = (low + high) / 2
        found = median_dice(truths, middle, seed, CALIBRATION_DRAWS)
        if abs(found - target) < 0.02:
            return middle
        low, high = (middle, high) if found > target else (low, middle)
    return (low + high) / 2


def median_dice(truths: Sequence[Truth], most: float, seed: int, draws: int) -> float:
    """Median Dice of so many corrupted masks of one region with their true ones."""
    rng, scores = np.random.default_rng(seed), []
    # as draw_severity draws them, but evenly, which makes the median steadier
    severities = most * (LEAST_DRAWN + (1 - LEAST_DRAWN) * (rng.permutation(draws) + 0.5) / draws)
    for n, severity in enumerate(severities.tolist()):
        mask, image, spacing = truths[n % len(truths)]
        corrupted = corrupt_region(mask, image, spacing, rng, severity)
        scores.append(dice(corrupted, mask) or 0.0)
    return float(np.median(scores))
