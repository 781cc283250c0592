"""Synthetic lesions for the second stage of nested labels, drawn into patches of real parents.

After Hu et al., "Label-Free Liver Tumor Segmentation" (CVPR 2023): elastic shapes, blurred edges and texture. Contrasts
and sizes follow the labelled lesions as far as there are any, and wide distributions otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from aslseg.cases.patches import Patch
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.relative import half_range, relative
from aslseg.settings import Settings
from aslseg.ssl.nested import Branch, branches
from aslseg.types import Labels

# as many labelled lesions as count as much as the wide distributions
ENOUGH = 8
RADIUS_MM = (2.5, 25.0)
# contrast of the wide distribution, in standard deviations of the parent's intensities
CONTRAST = (0.7, 3.0)
# lesions darker and brighter than their parent that are assumed before any is seen
PRIOR_DARKER, PRIOR_BRIGHTER = 3, 1
MOST = 4
# of a view's intensities, which are relative to the outermost label's median
MIDDLE = 0.5
MOST_COPIES = 16
# ends the id of a copy; no file and so no scan has such a name
COPY = "/synthetic"


@dataclass(frozen=True)
class Appearance:
    """What the labelled lesions of a class look like.

    Attributes:
        contrasts: Median of each lesion less the median of its parent, in units of the view's intensities.
        radii: Radius of the ball of the same volume, mm.
        deviation: Robust standard deviation of the parent's intensities, the same units.
        level: Median of the parent's intensities: that of the view (0.5) unless the parent lies in another label.
    """

    contrasts: tuple[float, ...]
    radii: tuple[float, ...]
    deviation: float
    level: float = MIDDLE

    @classmethod
    def of(cls, cases: Iterable[Prepared], value: int, parent: Sequence[int]) -> Appearance:
        """Measured on labelled cases.

        Args:
            cases: Views with labels.
            value: Of the lesion's class.
            parent: Values that make up the parent without its lesions.
        """
        return cls.pooled([cls._measured(case, value, parent) for case in cases])

    @classmethod
    def pooled(cls, parts: Sequence[Appearance]) -> Appearance:
        """All lesions of several cases, and medians of deviation (else 0.1) and level of those that hold the parent."""
        known = [one for one in parts if not math.isnan(one.deviation)]
        return cls(
            tuple(c for one in parts for c in one.contrasts),
            tuple(r for one in parts for r in one.radii),
            float(np.median([one.deviation for one in known])) if known else 0.1,
            float(np.median([one.level for one in known])) if known else MIDDLE,
        )

    @classmethod
    def _measured(cls, case: Prepared, value: int, parent: Sequence[int]) -> Appearance:
        """Of one case; without the parent nothing, and NaN as its deviation."""
        image, label = _numpy(case.image), _numpy(case.label)
        around = image[np.isin(label, parent)]
        if not around.size:
            return cls((), (), math.nan)
        middle = np.median(around)
        contrasts, radii = [], []
        numbers, _ = ndimage.label(label == value, np.ones((3, 3, 3)))
        for n, found in enumerate(ndimage.find_objects(numbers), 1):
            inside = numbers[found] == n
            contrasts.append(float(np.median(image[found][inside]) - middle))
            radii.append(float((3 * inside.sum() * math.prod(case.grid.spacing) / (4 * math.pi)) ** (1 / 3)))
        return cls(tuple(contrasts), tuple(radii), float(1.4826 * np.median(np.abs(around - middle))), float(middle))

    def draw(self, rng: np.random.Generator) -> tuple[float, float]:
        """A contrast and a radius in mm."""
        n = len(self.contrasts)
        chosen = int(rng.integers(n)) if n else 0
        if n and rng.random() < n / (n + ENOUGH):
            contrast = self.contrasts[chosen] * rng.uniform(0.7, 1.3)
        else:
            darker = PRIOR_DARKER + sum(c < 0 for c in self.contrasts)
            sign = -1 if rng.random() < darker / (n + PRIOR_DARKER + PRIOR_BRIGHTER) else 1
            contrast = sign * rng.uniform(*CONTRAST) * self.deviation
        if n and rng.random() < n / (n + ENOUGH):
            radius = self.radii[chosen] * math.exp(rng.normal(0, 0.25))
        else:
            radius = math.exp(rng.uniform(*np.log(RADIUS_MM)))
        return float(contrast), float(np.clip(radius, *RADIUS_MM))


class Lesions:
    """Draws lesions into patches with the voxel size of the first case; :meth:`at` gives another.

    Args:
        cases: Labelled views, to measure the lesions on; read one after the other, so that they need not be in memory
            at once.
        labels: Label set of the second stage.
        chance: That a patch gets any.
    """

    def __init__(self, cases: Iterable[Prepared], labels: Labels, chance: float) -> None:
        self.spacing = (1.0, 1.0, 1.0)
        self.chance = chance
        inner = [n for n, parent in enumerate(labels.parents) if parent is not None]
        # a lesion lies in the class of its parent itself
        self.hosts = {n + 1: labels.parents[n] + 1 for n in inner}  # type: ignore[operator]
        parts: dict[int, list[Appearance]] = {v: [] for v in self.hosts}
        for n, case in enumerate(cases):
            self.spacing = self.spacing if n else case.grid.spacing
            for v, host in self.hosts.items():
                parts[v].append(Appearance.of([case], v, [host]))
        self.appearance = {v: Appearance.pooled(found) for v, found in parts.items()}
        for v, host in self.hosts.items():
            if host not in self.hosts:
                # views are relative to the outermost label with all that lies in it
                self.appearance[v] = replace(self.appearance[v], level=MIDDLE)

    def at(self, spacing: tuple[float, float, float]) -> Lesions:
        """The same lesions for patches of another voxel size, in mm."""
        other = copy(self)
        other.spacing = spacing
        return other

    def into(self, patch: Patch, rng: np.random.Generator) -> Patch:
        """The patch with lesions of random classes, or as it is."""
        if rng.random() >= self.chance:
            return patch
        image, label = _numpy(patch.image).copy(), _numpy(patch.label).copy()
        for _ in range(int(min(1 + rng.poisson(1), MOST))):
            value = list(self.hosts)[int(rng.integers(len(self.hosts)))]
            place = np.flatnonzero(label == self.hosts[value])
            if place.size:
                centre = np.unravel_index(place[int(rng.integers(place.size))], label.shape)
                self._paint(image, label, value, np.array(centre), rng)
        return replace(patch, image=_like(image, patch.image), label=_like(label, patch.label))

    def _paint(
        self, image: np.ndarray, label: np.ndarray, value: int, centre: np.ndarray, rng: np.random.Generator
    ) -> None:
        look = self.appearance[value]
        contrast, radius = look.draw(rng)
        reach = np.ceil(1.7 * radius / np.array(self.spacing)).astype(int) + 2
        where = tuple(
            slice(max(c - r, 0), min(c + r + 1, n)) for c, r, n in zip(centre, reach, label.shape, strict=True)
        )
        mm = np.stack(
            np.meshgrid(
                *((np.arange(w.start, w.stop) - c) * s for w, c, s in zip(where, centre, self.spacing, strict=True)),
                indexing="ij",
            )
        )
        inner = self._shape(mm, radius, rng)
        host = ndimage.gaussian_filter((label[where] == self.hosts[value]).astype(np.float32), 0.5)
        edge = rng.uniform(0.3, 1.5) * min(1.0, radius / 6) + 0.2
        mask = host / (1 + np.exp(-np.clip(inner / edge, -30, 30)))
        within = mask > 0.5
        if not within.any():
            return
        # labelled lesions are measured with their blurred borders, and so count these
        contrast /= float(np.median(mask[within]))
        # what lies around the parent must not shine into it
        parent = np.where(label[where] > 0, image[where], look.level)
        image[where] += mask * self._inside(parent, inner, contrast, radius, look, rng)
        np.clip(image, 0, 1, out=image)
        label[where][within & (label[where] == self.hosts[value])] = value

    def _shape(self, mm: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
        """Depth in mm below the border of a random blob around the origin."""
        axes = radius * np.exp(rng.normal(0, 0.2, 3))
        turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        r = np.sqrt(np.square(np.tensordot(turn, mm, 1) / axes[:, None, None, None]).sum(0))
        rough = rng.uniform(0.05, 0.35)
        return radius * (1 + rough * self._field(r.shape, radius / 2, rng) - r)

    def _inside(
        self,
        image: np.ndarray,
        inner: np.ndarray,
        contrast: float,
        radius: float,
        look: Appearance,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """What is added to the image inside of a lesion."""
        texture = rng.uniform(0, 0.6) * look.deviation * self._field(image.shape, rng.uniform(1.5, 5), rng)
        # vessels end at a lesion: what is larger than noise fades
        smooth = ndimage.gaussian_filter(image, 1.5)
        added = contrast + texture + rng.uniform(0.2, 0.9) * (look.level - smooth)
        if radius > 5 and rng.random() < 0.3:
            width = rng.uniform(1, 3)
            added += -np.sign(contrast) * rng.uniform(0.3, 1.2) * abs(contrast) * np.exp(-np.square(inner / width))
        if radius > 8 and rng.random() < 0.3:
            # a core that differs more, as necrosis does
            added += contrast * rng.uniform(0.2, 0.8) / (1 + np.exp(-np.clip((inner - radius / 2) / 2, -30, 30)))
        return added

    def _field(self, shape: tuple[int, ...], sigma_mm: float, rng: np.random.Generator) -> np.ndarray:
        """Smooth noise of zero mean and unit variance."""
        field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma_mm / np.array(self.spacing))
        return (field - field.mean()) / max(float(field.std()), 1e-6)


def with_synthetic(labelled: Sequence[Prepared], settings: Settings) -> list[Prepared]:
    """Labelled cases, and a copy of each with synthetic lesions in its parents; for networks that see whole scans.

    At most ``MOST_COPIES`` copies are made, of randomly chosen cases that hold a parent. Without nested labels, with
    one network for all labels, or with ``nested_synthetic`` 0 there are none.

    Args:
        labelled: On the working grid.
        settings: ``nested_synthetic``, ``nested_range``, ``seed``, labels.
    """
    shown, found = half_range(settings), list(labelled)
    if shown is None or not settings.nested_synthetic:
        return found
    inner = branches(settings.label_set)
    # a lesion without its parent has nothing to be relative to
    parents = [[b for b in inner if c.label is not None and (np.asarray(c.label) == b.values[0]).any()] for c in found]
    holding = [n for n, held in enumerate(parents) if held]
    rng = np.random.default_rng([settings.seed, 5])
    chosen = sorted(rng.permutation(holding)[:MOST_COPIES].tolist(), key=lambda n: found[n].id)
    copies = {n: replace(found[n], id=found[n].id + COPY, image_hash="", label_hash="") for n in chosen}
    for branch in inner:
        having = [n for n in holding if branch in parents[n]]
        lesions = Lesions((_relative(found[n], branch, shown) for n in having), branch.labels, 1.0)
        copies |= {n: _painted(c, branch, lesions, shown, rng) for n, c in copies.items() if branch in parents[n]}
    return [*found, *copies.values()]


def _relative(case: Prepared, branch: Branch, shown: float) -> Prepared:
    """The whole scan relative to a parent, with the labels of its branch."""
    image, label = np.asarray(case.image), np.asarray(case.label)
    centre = float(np.median(image[np.isin(label, branch.values)]))
    return replace(case, image=relative(image, centre, shown), label=branch.inner(label))


def _painted(case: Prepared, branch: Branch, lesions: Lesions, shown: float, rng: np.random.Generator) -> Prepared:
    """A case with lesions in it, painted at relative intensities."""
    seen = _relative(case, branch, shown)
    before = np.asarray(seen.image)
    patch = lesions.at(case.grid.spacing).into(Patch(before, seen.label, None), rng)
    image = np.asarray(case.image) + (patch.image - before) * np.float32(2 * shown)
    inside = patch.label > 0
    label = np.array(case.label)
    label[inside] = np.array([0, *branch.values], np.uint8)[patch.label[inside]]
    return replace(case, image=np.clip(image, 0, 1).astype(np.float32), label=label)


def _numpy(array: Any) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def _like(array: np.ndarray, model: Any) -> Any:
    return torch.from_numpy(array).to(model.device) if isinstance(model, torch.Tensor) else array
