"""Whether a machine mask looks like the human labels: volume, pieces, shape and place in the scan.

Volume and number of pieces have wide limits that no human label comes near. Shape and place are simple features whose
distance from those of the human labels is measured (Mahalanobis, with shrinkage). Anatomy, crops and fields of view
decide what that distance is worth, so it is measured first: each human label is judged by the others. Only where these
judgements reject almost no human label does the distance speak against a mask; elsewhere it says that a person should
have a look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage, stats

from aslseg.cases.prepared_case import Prepared
from aslseg.types import Labels

WORTH_A_LOOK = "worth a look"
"""How a flag ends that sends a mask to a person; no reason against the mask."""
SMALLEST_VOLUME, LARGEST_VOLUME = 0.2, 5.0
"""Times the smallest and the largest human volume."""
MOST_COMPONENTS, COMPONENTS_FACTOR = 30, 3
"""Components that are always allowed, and times the most that a human label has."""
LEAST_LABELS, LEAST_TRUSTED = 4, 8
"""Human labels from which on a distance is measured at all, and from which on it may speak against a mask."""
MOST_REJECTED = 0.05
"""Part of the human labels that the others may reject for the distance to speak against a mask."""
QUANTILE = 0.999
"""Of the distances that are expected of masks like the human labels; beyond it a mask is unlike them."""
AIR = 0.1
"""Intensity (of 0..1) above which a voxel is of the body."""
EDGE = 0.02
"""Part of the voxels that may lie outside of an extent, on each side, so that specks do not move it."""
_ANY_NEIGHBOUR = np.ones((3, 3, 3), bool)

Box = tuple[np.ndarray, np.ndarray]
"""First and last position along i, j, k, in voxels."""
# smallest standard deviations: of log volume and log extents, place, elongation, tilts, and skewness
_SPREADS = np.array([0.1] + 3 * [0.05] + 3 * [0.02] + [0.05] + 3 * [0.05] + 3 * [0.1])


@dataclass(frozen=True)
class Shapes:
    """Features of the human labels of one label.

    Attributes:
        centre: (F,) mean.
        scale: (F,) standard deviation.
        inverse: (F, F) inverse of the shrunk correlations.
        count: Number of labels.
        rejected: Part of them that the others reject.
    """

    centre: np.ndarray
    scale: np.ndarray
    inverse: np.ndarray
    count: int
    rejected: float = 1.0

    @classmethod
    def of(cls, features: np.ndarray) -> Shapes:
        """From (n, F) features, without :attr:`rejected`.

        The correlations R are shrunk to (1 - a) R + a I with a = F / (F + n): few labels say little of them.
        """
        count, size = features.shape
        centre = features.mean(0)
        scale = np.maximum(features.std(0, ddof=1), _SPREADS)
        z = (features - centre) / scale
        shrink = size / (size + count)
        correlation = z.T @ z / (count - 1)
        np.fill_diagonal(correlation, 1.0)
        return cls(centre, scale, np.linalg.inv((1 - shrink) * correlation + shrink * np.eye(size)), count)

    def excess(self, features: np.ndarray) -> float:
        """Distance of a mask's features (F,), as a multiple of the largest expected one.

        Hotelling's prediction: D^2 <= (1 + 1/n) F (n - 1) / (n - F) f, here with the chi-square quantile of the
        features' number for large n and Student's t for the spread that few labels estimate badly.
        """
        z = (features - self.centre) / self.scale
        squared = float(z @ self.inverse @ z)
        size, count = len(z), self.count
        wide = stats.t.ppf((1 + QUANTILE) / 2, count - 1) / stats.norm.ppf((1 + QUANTILE) / 2)
        return math.sqrt(squared / ((1 + 1 / count) * wide**2 * stats.chi2.ppf(QUANTILE, size)))

    @property
    def trusted(self) -> bool:
        """Whether the distance may speak against a mask."""
        return self.count >= LEAST_TRUSTED and self.rejected <= MOST_REJECTED


@dataclass(frozen=True)
class Reference:
    """What the human labels look like; each label includes everything nested in it.

    Attributes:
        volumes: Smallest and largest volume in mm³ among the labelled cases that hold the label; a label that no
            case holds is left out.
        components: Most connected components (26-neighbourhood) in one case.
        shapes: Features, of labels that enough cases hold and that lie in no other one.
    """

    volumes: dict[str, tuple[float, float]]
    components: dict[str, int]
    shapes: dict[str, Shapes] = field(default_factory=dict)


def reference(labelled: Sequence[Prepared], labels: Labels) -> Reference:
    """Measure the human labels; cases without a label are passed over."""
    volumes: dict[str, list[float]] = {name: [] for name in labels.names}
    components = dict.fromkeys(labels.names, 0)
    features: dict[str, list[np.ndarray]] = {name: [] for name in labels.names}
    patients: dict[str, list[str]] = {name: [] for name in labels.names}
    for case in labelled:
        if case.label is None:
            continue
        regions = labels.regions(np.asarray(case.label))
        for name, mask in zip(labels.names, regions, strict=True):
            if mask.any():
                volumes[name].append(float(mask.sum()) * math.prod(case.grid.spacing))
                components[name] = max(components[name], count_components(mask))
        for name, values in case_features(case.image, regions, case.grid.spacing, labels).items():
            features[name].append(values)
            patients[name].append(case.patient)
    shapes = {n: learned(np.array(r), patients[n]) for n, r in features.items() if len(r) >= LEAST_LABELS}
    return Reference({n: (min(v), max(v)) for n, v in volumes.items() if v}, components, shapes)


def learned(features: np.ndarray, patients: Sequence[str] | None = None) -> Shapes:
    """The shapes of (n, F) features, with the part of them that the others reject.

    Args:
        features: Of the human labels.
        patients: Whose they are; labels of one patient do not judge each other. None: all of different ones.
    """
    whose = np.array(range(len(features)) if patients is None else patients)
    rejected = []
    for one, patient in zip(features, whose, strict=True):
        rest = features[whose != patient]
        # two labels give no spread
        rejected.append(len(rest) < LEAST_LABELS - 1 or Shapes.of(rest).excess(one) > 1)
    whole = Shapes.of(features)
    return Shapes(whole.centre, whole.scale, whole.inverse, whole.count, float(np.mean(rejected)))


def implausible(
    class_map: np.ndarray, image: np.ndarray | None, spacing: Sequence[float], reference: Reference, labels: Labels
) -> tuple[list[str], list[str]]:
    """How a mask differs from all human labels.

    Args:
        class_map: (i, j, k) uint8.
        image: (i, j, k) in 0..1, its scan; None leaves shape and place unchecked.
        spacing: Voxel size in mm.
        reference: From the human labels.
        labels: With their nesting.

    Returns:
        Reasons against the mask, and what a person should look at.
    """
    reasons: list[str] = []
    flags: list[str] = []
    regions = labels.regions(class_map)
    for name, mask in zip(labels.names, regions, strict=True):
        if not mask.any():
            continue
        if name not in reference.volumes:
            reasons.append(f"{name}: no labelled case holds it")
            continue
        volume = float(mask.sum()) * math.prod(spacing)
        low, high = SMALLEST_VOLUME * reference.volumes[name][0], LARGEST_VOLUME * reference.volumes[name][1]
        if not low <= volume <= high:
            reasons.append(f"{name}: volume {volume / 1000:.2f} ml outside {low / 1000:.2f}..{high / 1000:.2f} ml")
        most = max(MOST_COMPONENTS, COMPONENTS_FACTOR * reference.components.get(name, 0))
        count = count_components(mask)
        if count > most:
            reasons.append(f"{name}: {count} pieces, more than {most}")
    if image is not None and reference.shapes:
        for name, values in case_features(image, regions, spacing, labels).items():
            shapes = reference.shapes.get(name)
            if shapes is not None and shapes.excess(values) > 1:
                text = f"{name}: unlike the {shapes.count} human labels in shape or place"
                (reasons if shapes.trusted else flags).append(text if shapes.trusted else f"{text}: {WORTH_A_LOOK}")
    return reasons, flags


def case_features(
    image: np.ndarray, regions: np.ndarray, spacing: Sequence[float], labels: Labels
) -> Mapping[str, np.ndarray]:
    """Features of each label that a case holds and that lies in no other one, for :class:`Shapes`.

    Log of the volume (mm³) and of the extents (mm); the centre's place in the body's box; log of the elongation
    (longest to shortest standard deviation); the correlations between the axes (how it is tilted) and the skewness
    along each. The last six change sign where a mask is mirrored. What lies in another label (a lesion) may have any
    shape.

    Args:
        image: (i, j, k) in 0..1.
        regions: (N, i, j, k) bool, each label with everything nested in it.
        spacing: Voxel size in mm.
        labels: With their nesting.
    """
    outer = zip(labels.names, labels.parents, regions, strict=True)
    found = {name: mask for name, parent, mask in outer if parent is None and mask.any()}
    body = _body(np.asarray(image)) if found else None
    return {name: features(mask, spacing, body) for name, mask in found.items() if body}


def _body(image: np.ndarray) -> Box:
    """Where the body is in a scan; the whole scan where all of it is dark."""
    inside = image > AIR
    return extent(inside if inside.any() else ~inside)


def features(mask: np.ndarray, spacing: Sequence[float], body: Box) -> np.ndarray:
    """The features of one mask, (14,) float64; see :func:`case_features`.

    Args:
        mask: (i, j, k) bool, not empty.
        spacing: Voxel size in mm.
        body: In which its place is measured.
    """
    positions = np.argwhere(mask) * np.asarray(spacing, float)
    size = np.asarray(spacing, float)
    centre = positions.mean(0)
    moved = positions - centre
    # a mask of one voxel has the spread of a voxel
    covariance = moved.T @ moved / len(moved) + np.diag(size**2 / 12)
    spread = np.sqrt(np.diag(covariance))
    axes = np.linalg.eigvalsh(covariance)
    tilts = (covariance / np.outer(spread, spread))[np.triu_indices(3, 1)]
    skewness = (moved**3).mean(0) / spread**3
    place = (centre / size - body[0]) / np.maximum(body[1] - body[0], 1)
    first, last = extent(mask)
    extents = (last - first + 1) * size
    volume = len(positions) * math.prod(spacing)
    elongation = math.log(math.sqrt(axes[-1] / axes[0]))
    return np.array([math.log(volume), *np.log(extents), *place, elongation, *tilts, *skewness])


def extent(mask: np.ndarray) -> Box:
    """Where all but a few voxels of a mask lie, along i, j, k.

    Args:
        mask: (i, j, k) bool, not empty.
    """
    low, high = [], []
    for axis in range(3):
        profile = np.cumsum(np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis)))
        low.append(int(np.searchsorted(profile, EDGE * profile[-1], side="right")))
        high.append(int(np.searchsorted(profile, (1 - EDGE) * profile[-1])))
    return np.array(low), np.array(high)


def count_components(mask: np.ndarray) -> int:
    """Connected components of a mask (26 neighbours)."""
    return int(ndimage.label(mask, _ANY_NEIGHBOUR)[1])
