"""Intensities relative to a parent: what a nested label, such as a tumour in a liver, is looked for in.

The parents of several scans differ by more than a nested label differs from its parent, so that no absolute intensity
means tumour. Every stage sees nested labels in this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aslseg.settings import Settings
from aslseg.types import Labels


def relative(values: np.ndarray, centre: float, half_range: float) -> np.ndarray:
    """Intensities around a parent's median, 0.5 there, clipped to 0..1.

    Args:
        values: Any shape, 0..1.
        centre: The parent's median, 0..1.
        half_range: Distance from it at which 0 and 1 are reached.
    """
    return np.clip(0.5 + (values - centre) / (2 * half_range), 0, 1)


def half_range(settings: Settings) -> float | None:
    """The range of relative intensities; None where all labels are seen as they are.

    That is without nested labels, or with one network for all of them (``nested_fraction`` 0).
    """
    nested = settings.label_set.has_nested
    return settings.nested_range if nested and settings.nested_fraction else None


def outermost(labels: Labels) -> list[int | None]:
    """For each label the index of the outermost one that it lies in; None for those that lie in no other."""
    found: list[int | None] = []
    for parent in labels.parents:
        # parents stand before their children
        found.append(None if parent is None else parent if found[parent] is None else found[parent])
    return found


def parents(labels: Labels) -> list[int]:
    """Indices of the outermost labels that others lie in."""
    return sorted({outer for outer in outermost(labels) if outer is not None})


def centres(image: Any, regions: Sequence[np.ndarray], labels: Labels) -> dict[int, float]:
    """Median intensity of each outermost label that others lie in, where it is found.

    Where nothing but a nested label is found, there is nothing that this could be relative to.

    Args:
        image: (i, j, k) in 0..1.
        regions: A mask (i, j, k) of each label with everything nested in it, bool.
        labels: The labels.

    Returns:
        Index of the label to its median.
    """
    pixels, found = np.asarray(image), {}
    for n in parents(labels):
        nested = np.logical_or.reduce([regions[m] for m, parent in enumerate(labels.parents) if parent == n])
        if (regions[n] & ~nested).any():
            found[n] = float(np.median(pixels[regions[n]]))
    return found


def views(image: np.ndarray, found: Mapping[int, float], labels: Labels, half_range: float | None) -> np.ndarray:
    """An image, and for each outermost label that others lie in the image relative to it, (V, i, j, k) float32.

    Args:
        image: (i, j, k) in 0..1.
        found: From :func:`centres`; where a parent is not found, the image stands in for the relative one.
        labels: The labels.
        half_range: From :func:`half_range`; None: the image alone.
    """
    if half_range is None:
        return image[None].astype(np.float32)
    around = [relative(image, found[n], half_range) if n in found else image for n in parents(labels)]
    return np.stack([image, *around]).astype(np.float32)
