"""The second stage of nested labels: a tumour is looked for inside its liver, at intensities relative to the liver's.

A label that has others nested in it (``nested``, ``tumour:liver``) is found by a first network, to which a tumour is
liver. A second network sees the parent's box on a grid of its own, with intensities relative to the parent's median:
the livers of several scans differ by more HU than a tumour differs from its liver, so that no absolute value means
tumour. The first network, which only has to find the parent, may see the scan on a coarser grid, where its patches
reach further. This module says which labels belong to a stage and makes the stages' views of a scan;
:mod:`aslseg.ssl.training` trains both, :mod:`aslseg.ssl.predict` puts their predictions together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from scipy import ndimage

from aslseg.cases.prepare import Spacing
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.relative import relative
from aslseg.settings import Settings
from aslseg.types import Labels
from aslseg.volume.geometry import Grid, resize, resize_label

# names of the stages' tensors in a model file start with these
FIRST = "first."


def second_prefix(parent: str) -> str:
    """Beginning of the names of a second stage's tensors."""
    return f"second.{parent}."


def split(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors of one stage, under the names that its network knows."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


# voxel size that stands for the scans' own, whatever these are: then mm are voxels
NATIVE = (1.0, 1.0, 1.0)
# probability below which nothing is said
LEAST = 1e-6
# smaller components of a predicted parent, as a part of its largest, do not widen its box
LEAST_COMPONENT = 0.2


@dataclass(frozen=True)
class Branch:
    """A top-level label with everything nested in it.

    Attributes:
        parent: Index of the top-level label.
        values: Values of the members in the whole label set, the parent's own first.
        labels: The members as a label set of their own, value n + 1 for ``values[n]``.
    """

    parent: int
    values: tuple[int, ...]
    labels: Labels

    def inner(self, class_map: np.ndarray) -> np.ndarray:
        """A class map of the whole label set to one of the members, uint8; everything else is background."""
        table = np.zeros(256, np.uint8)
        table[list(self.values)] = np.arange(1, len(self.values) + 1)
        return table[class_map]


def branches(labels: Labels) -> list[Branch]:
    """The top-level labels that have others nested in them."""
    found = []
    for top in top_level(labels):
        members = [value - 1 for value in labels.members(top)]
        if len(members) > 1:
            parents = [labels.parents[n] for n in members]
            inner = Labels(
                tuple(labels.names[n] for n in members), tuple(None if p is None else members.index(p) for p in parents)
            )
            found.append(Branch(top, tuple(n + 1 for n in members), inner))
    return found


def top_level(labels: Labels) -> list[int]:
    """Indices of the labels that lie in no other."""
    return [n for n, parent in enumerate(labels.parents) if parent is None]


def without_parent(case: Prepared, branch: Branch, labels: Labels) -> str | None:
    """What is said of a labelled case that shows something nested in a parent but not the parent itself; else None.

    Args:
        case: Its label may hold values of :meth:`aslseg.types.Labels.mark_unknown`.
        branch: The parent and what is nested in it.
        labels: All labels.
    """
    values = np.unique(case.label) if case.label is not None else np.zeros(0)
    shown = np.isin(branch.values, values) | np.isin(np.add(branch.values, len(labels)), values)
    if shown[0] or not shown.any():
        return None
    parent, *inner = branch.labels.names
    return (
        f"{case.id} is labelled with {' or '.join(inner)} but without {parent} around it: nothing is learned from "
        f"this label; draw {parent} too"
    )


def merged(class_map: np.ndarray, labels: Labels) -> np.ndarray:
    """A class map with every nested label counted as its top-level parent; values 1.. in the order of `top_level`."""
    table = np.zeros(256, np.uint8)
    for value, top in enumerate(top_level(labels), 1):
        members = labels.members(top)
        table[members] = value
        # what is only known to be a label or anything nested in it
        table[[len(labels) + member for member in members]] = value
    return table[class_map]


def settings_of(settings: Settings, labels: Labels) -> Settings:
    """The settings with another label set."""
    pairs = tuple((n, labels.names[p]) for n, p in zip(labels.names, labels.parents, strict=True) if p is not None)
    return settings.model_copy(update={"labels": labels.names, "nested": pairs})


def first_settings(settings: Settings) -> Settings:
    """The settings of the first stage: top-level labels only."""
    names = settings.label_set.names
    top = [names[n] for n in top_level(settings.label_set)]
    return settings_of(settings, Labels(tuple(top), (None,) * len(top)))


@dataclass(frozen=True)
class Scale:
    """A stage's voxels and those of the working grid; stored with the model.

    Attributes:
        spacing: Voxel size of what the stage sees, in mm.
        working: Voxel size of the working grid in mm; NATIVE where the scans' own is used.
    """

    spacing: tuple[float, float, float]
    working: tuple[float, float, float]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """As stored in a model file, where tuples have become lists."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return cls(**values)

    def stored(self) -> dict[str, Any]:
        """For a model file."""
        return asdict(self)

    def shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Shape in the stage's voxels of (i, j, k) voxels of the working grid."""
        i, j, k = (max(1, round(n * w / s)) for n, w, s in zip(shape, self.working, self.spacing, strict=True))
        return i, j, k

    def grid(self, shape: tuple[int, int, int]) -> Grid:
        """Grid of a case in the stage's voxels."""
        return Grid(shape, np.diag([*self.spacing, 1.0]), shape, shape, self.spacing)


@dataclass(frozen=True)
class Geometry(Scale):
    """How the second stage's view lies in the working grid; stored with the model.

    Attributes:
        margin: Around the parent, mm.
        half_range: Intensities this far from the parent's median (in 0..1 of the working image) become 0 and 1.
        centre: Typical median of the parent, for scans in which no parent is found.
    """

    margin: float
    half_range: float
    centre: float


@dataclass(frozen=True)
class View:
    """The second stage's view of a scan.

    Attributes:
        where: The box on the working grid.
        image: (i, j, k) float32 in 0..1, 0.5 at the parent's median.
    """

    where: tuple[slice, slice, slice]
    image: np.ndarray


def look(image: np.ndarray, parent: np.ndarray, geometry: Geometry) -> View:
    """The view of a scan for the mask of the parent; without a parent, of the whole scan.

    Args:
        image: (i, j, k) float32 in 0..1 on the working grid.
        parent: (i, j, k) bool on the working grid.
        geometry: Of the model.
    """
    where = box(parent, geometry)
    inside = np.asarray(image[where], np.float32)
    mask = parent[where]
    centre = float(np.median(inside[mask])) if mask.any() else geometry.centre
    return View(where, relative(resize(inside, geometry.shape(mask.shape)), centre, geometry.half_range))


def box(parent: np.ndarray, geometry: Geometry) -> tuple[slice, slice, slice]:
    """The parent's bounding box with the margin, within the scan; the whole scan where there is no parent."""
    if not parent.any():
        i, j, k = (slice(0, n) for n in parent.shape)
        return i, j, k
    found = []
    for axis, (n, mm) in enumerate(zip(parent.shape, geometry.working, strict=True)):
        there = np.flatnonzero(parent.any(tuple(a for a in range(3) if a != axis)))
        margin = int(np.ceil(geometry.margin / mm))
        found.append(slice(max(int(there[0]) - margin, 0), min(int(there[-1]) + 1 + margin, n)))
    return found[0], found[1], found[2]


def largest(mask: np.ndarray) -> np.ndarray:
    """A predicted parent without its small components (26 neighbours)."""
    numbers, count = ndimage.label(mask, np.ones((3, 3, 3)))
    if count < 2:
        return mask
    sizes = np.bincount(numbers.ravel())
    sizes[0] = 0
    return (sizes >= LEAST_COMPONENT * sizes.max())[numbers]


def view_case(case: Prepared, parent: np.ndarray, branch: Branch, geometry: Geometry) -> Prepared:
    """A case as the second stage trains on it; the label, if there is one, on the view's grid."""
    view = look(case.image, parent, geometry)
    label = weight = None
    if case.label is not None:
        label = resize_label(branch.inner(np.asarray(case.label[view.where])), branch.labels, view.image.shape)
    if case.voxel_weight is not None:
        weight = _resized_weight(case.voxel_weight[view.where], view.image.shape)
    return replace(
        case,
        image=view.image,
        grid=geometry.grid(view.image.shape),  # type: ignore[arg-type]
        label=label,
        voxel_weight=weight,
        relative=True,
    )


def scaled_case(case: Prepared, labels: Labels, scale: Scale) -> Prepared:
    """A case as the first stage trains on it, on its grid.

    Args:
        case: On the working grid; its label, if there is one, holds ``labels``.
        labels: Of the first stage.
        scale: Of the first stage.
    """
    shape = scale.shape(case.image.shape)
    return replace(
        case,
        image=resize(np.asarray(case.image, np.float32), shape),
        grid=scale.grid(shape),
        label=None if case.label is None else resize_label(np.asarray(case.label), labels, shape),
        voxel_weight=None if case.voxel_weight is None else _resized_weight(case.voxel_weight, shape),
    )


def _resized_weight(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return resize(np.asarray(weight, np.float32), shape).astype(np.float16)


def first_scale(labelled: Sequence[Prepared], settings: Settings, spacing: Spacing) -> Scale:
    """The first stage's grid: the working grid, or coarser so that the median scan has ``nested_first_voxels``.

    It is the working grid where a label has nothing nested in it, since no second stage draws its border again.

    Args:
        labelled: On the working grid.
        settings: Labels and size.
        spacing: Of the working grid; None for the scans' own.
    """
    working = spacing or NATIVE
    if len(branches(settings.label_set)) < len(top_level(settings.label_set)):
        return Scale(working, working)
    size = np.median([case.image.shape for case in labelled], axis=0) * working
    return Scale(_coarsened(working, size, settings.nested_first_voxels), working)


def _coarsened(voxel: Sequence[float], size: np.ndarray, most: float) -> tuple[float, float, float]:
    """A voxel size, coarsened along the finest axis or axes until a size in mm has at most so many voxels."""
    found = np.array(voxel, float)
    while np.prod(size / found) > most:
        finest = found.min()
        found[found <= finest * 1.001] *= 1.02
    x, y, z = (round(float(v), 4) for v in found)
    return x, y, z


def geometry(labelled: Sequence[Prepared], branch: Branch, settings: Settings, spacing: Spacing) -> Geometry:
    """The second stage's grid for labelled cases on the working grid.

    The view's voxels are the working grid's, coarsened along the finest axis or axes until the median box has at most
    ``nested_voxels``.

    Args:
        labelled: On the working grid, with the labels of the whole set.
        branch: Whose members are looked for.
        settings: Margin, range and size.
        spacing: Of the working grid; None for the scans' own.
    """
    working = spacing or NATIVE
    first = Geometry(working, working, settings.nested_margin, settings.nested_range, 0.5)
    shapes, centres = [], []
    for case in labelled:
        parent = np.zeros(0) if case.label is None else np.isin(case.label, branch.values)
        if parent.any():
            shapes.append([s.stop - s.start for s in box(parent, first)])
            centres.append(float(np.median(np.asarray(case.image)[parent])))
    if not shapes:
        return first
    voxel = _coarsened(working, np.median(shapes, axis=0) * working, settings.nested_voxels)
    return replace(first, spacing=voxel, centre=float(np.median(centres)))


def put(p: np.ndarray, inside: np.ndarray, branch: Branch, found: bool = True) -> None:
    """Put the second stage's probabilities into those of the whole label set, in place.

    What belongs to the parent is the mean of both stages, which err in different places: the first sees more of the
    scan, the second sees it finer. The second alone says which member it is, the first which of the other labels.

    Args:
        p: (1 + N, i, j, k) of the first stage in the box.
        inside: (1 + M, i, j, k), first what lies outside of the parent, then its members.
        branch: The members.
        found: Whether the first stage has found the parent; else the second alone says where it is.
    """
    within = 1 - inside[0]
    if found:
        within = (within + p[branch.values[0]]) / 2
    others = [c for c in range(len(p)) if c not in branch.values]
    # where a stage is certain of something else, what is left to share out is the parent itself, or background
    rest, members = p[others], inside[1:].copy()
    rest[0] += LEAST
    members[0] += LEAST
    p[others] = rest / rest.sum(0) * (1 - within)
    p[list(branch.values)] = members / members.sum(0) * within


def clear_outside(p: np.ndarray, where: tuple[slice, slice, slice], branch: Branch) -> None:
    """Make background of the parent outside of its box, in place: islands that do not count as parent.

    Args:
        p: (1 + N, i, j, k) of the first stage.
        where: The box.
        branch: The parent.
    """
    parent = branch.values[0]
    background, inside = p[(0, *where)].copy(), p[(parent, *where)].copy()
    p[0] += p[parent]
    p[parent] = 0
    p[(0, *where)], p[(parent, *where)] = background, inside
