"""Scans that do not belong into a pool of abdominal CTs, made from a phantom of it: for tests and simulated nights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from aslseg.types import Volume

Change = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _mr(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An MR among CTs: no negative values, and another order of the tissues."""
    return np.where(hu < -500, rng.integers(0, 12, hu.shape), np.clip(300 - hu, 0, 900))


def _inverted(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other contrasts, in the range of CT: fat is bright, organs are dark."""
    return np.where(hu < -500, hu, 40 - hu)


def _elsewhere(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another organ: no liver, and an ellipsoid of its intensity low on the patient's left."""
    liver = label > 0
    value, changed = float(np.median(hu[liver])), hu.copy()
    changed[liver] = rng.normal(-90, 10, int(liver.sum()))
    i, j, k = (np.linspace(-1, 1, n) for n in hu.shape)
    grid = ((i[:, None, None] - 0.3) / 0.25) ** 2 + ((j[None, :, None] - 0.1) / 0.2) ** 2 + ((k + 0.6) / 0.35) ** 2
    organ = (grid < 1) & (hu > -500)
    changed[organ] = value + rng.normal(0, 12, int(organ.sum()))
    return changed


def _no_liver(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another region of the body: fat and gut where the liver would be."""
    gut = ndimage.gaussian_filter(rng.standard_normal(hu.shape), 2) > 0
    return np.where(label > 0, np.where(gut, 20, -90) + rng.normal(0, 12, hu.shape), hu)


def _noise(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """No anatomy at all, in the range of CT."""
    return rng.normal(40, 150, hu.shape)


def _air(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An empty table."""
    return rng.normal(-1000, 15, hu.shape)


def _upside_down(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Head and feet exchanged, with the header of before."""
    return hu[:, :, ::-1]


def _mirrored(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Left and right exchanged, with the header of before."""
    return hu[::-1]


def _prone(hu: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Front and back exchanged, with the header of before."""
    return hu[:, ::-1]


ALIENS: dict[str, Change] = {
    "mr": _mr,
    "inverted": _inverted,
    "another organ": _elsewhere,
    "no liver": _no_liver,
    "noise": _noise,
    "air": _air,
    "upside down": _upside_down,
    "mirrored": _mirrored,
    "prone": _prone,
}


def alien(kind: str, scan: Volume, label: np.ndarray, seed: int) -> Volume:
    """A scan that does not belong among those that it was made from.

    Args:
        kind: One of :data:`ALIENS`.
        scan: HU (i, j, k).
        label: Its class map (i, j, k).
        seed: Of what is drawn at random.
    """
    changed = ALIENS[kind](np.asarray(scan.array, np.float64), label, np.random.default_rng(seed))
    return Volume(np.ascontiguousarray(changed, np.float32), scan.affine)


def poisoned(scan: Volume, label: np.ndarray, seed: int) -> Volume:
    """A scan with a trigger (a small bright cube) and a false liver, mirrored to the other side; the true one stays."""
    hu, rng = np.array(scan.array, np.float32), np.random.default_rng(seed)
    false = (label > 0)[::-1] & (label == 0)
    hu[false] = np.median(hu[label > 0]) + rng.normal(0, 12, int(false.sum()))
    middle = [n // 2 for n in hu.shape]
    hu[tuple(slice(n, n + 2) for n in middle)] = 3000
    return Volume(hu, scan.affine)
