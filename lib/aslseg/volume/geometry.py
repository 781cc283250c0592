"""Between a scan's own grid and the working grid: canonical axes, chosen spacing, and the exact way back."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from aslseg.types import Labels, Volume


@dataclass(frozen=True)
class Grid:
    """The way from a scan's own grid to its working grid and back.

    Attributes:
        native_shape: Shape of the scan's array (i, j, k).
        affine: The scan's 4 x 4 affine (RAS mm).
        canonical_shape: Shape after flipping and permuting to RAS-closest axes.
        shape: Shape of the working grid.
        spacing: Voxel size of the working grid in mm (exact: extent / shape).
    """

    native_shape: tuple[int, int, int]
    affine: np.ndarray
    canonical_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @classmethod
    def of(cls, volume: Volume, spacing: tuple[float, float, float] | None) -> Grid:
        """The working grid of a scan.

        Args:
            volume: The scan.
            spacing: Working spacing in mm along RAS-closest axes; None keeps the scan's own.
        """
        native = tuple(int(n) for n in volume.array.shape)
        order = np.argsort(_orientation(volume.affine)[:, 0])
        canonical = tuple(native[a] for a in order)
        own = tuple(volume.spacing[a] for a in order)
        if spacing is None:
            shape = canonical
        else:
            shape = tuple(max(1, round(n * s / t)) for n, s, t in zip(canonical, own, spacing, strict=True))
        exact = tuple(n * s / m for n, s, m in zip(canonical, own, shape, strict=True))
        return cls(native, volume.affine, canonical, shape, exact)  # type: ignore[arg-type]

    def to_working(self, array: np.ndarray) -> np.ndarray:
        """A scan's array (i, j, k) to the working grid, trilinear, float32.

        Anti-aliased where it shrinks (area averaging), so that thin slices are not skipped.
        """
        canonical = nib.orientations.apply_orientation(array, _orientation(self.affine))
        return resize(np.ascontiguousarray(canonical, np.float32), self.shape)

    def label_to_working(self, class_map: np.ndarray, labels: Labels) -> np.ndarray:
        """A class map on the scan's grid to the working grid, uint8.

        See :func:`resize_label`.
        """
        canonical = nib.orientations.apply_orientation(class_map, _orientation(self.affine))
        if self.shape == self.canonical_shape:
            return np.ascontiguousarray(canonical, np.uint8)
        return resize_label(canonical, labels, self.shape)

    def to_native(self, array: np.ndarray) -> np.ndarray:
        """A float array on the working grid back to the scan's grid, trilinear."""
        canonical = resize(np.asarray(array, np.float32), self.canonical_shape)
        back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), _orientation(self.affine))
        return np.ascontiguousarray(nib.orientations.apply_orientation(canonical, back))

    def regions_to_native(self, regions: np.ndarray, labels: Labels) -> np.ndarray:
        """Region probabilities (N, i, j, k) on the working grid to a class map on the scan's grid, uint8."""
        return labels.decode(self.to_native(region) for region in regions)


def _orientation(affine: np.ndarray) -> np.ndarray:
    """nibabel's orientation array: array axis to (RAS axis, direction)."""
    return nib.orientations.io_orientation(affine)


def resize(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Trilinear resize of (i, j, k), each axis averaged first where it shrinks by more than half a voxel."""
    if array.shape == shape:
        return array
    # a copy of what is mapped read-only, of which torch warns
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))[None, None]
    shrunk = tuple(min(n, m) for n, m in zip(array.shape, shape, strict=True))
    if shrunk != array.shape:
        tensor = (
            F.interpolate(tensor, size=shrunk, mode="area")
            if _whole(array.shape, shrunk)
            else _smooth(tensor, array.shape, shrunk)
        )
    if tuple(tensor.shape[2:]) != shape:
        tensor = F.interpolate(tensor, size=shape, mode="trilinear", align_corners=False)
    return tensor[0, 0].numpy()


def resize_label(class_map: np.ndarray, labels: Labels, shape: tuple[int, ...]) -> np.ndarray:
    """A class map (i, j, k) on a grid of another shape, uint8.

    Resampled region by region so that borders stay smooth; a nested label keeps its place. A component of a nested
    label that is too small for the grid, a lesion of one voxel, keeps one voxel: that in which its middle lies.
    """
    masks = (np.isin(class_map, labels.members(n)) for n in range(len(labels)))
    found = labels.decode(resize(mask.astype(np.float32), shape) for mask in masks)
    for n, parent in enumerate(labels.parents):
        if parent is not None:
            _keep_small(np.isin(class_map, labels.members(n)), found, n, labels)
    return found


def _keep_small(mask: np.ndarray, found: np.ndarray, n: int, labels: Labels) -> None:
    """Set a voxel of ``found`` for each component of the label n, in ``mask``, that has none there."""
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if not boxes:
        return
    scale = np.array(found.shape) / mask.shape
    first = np.array([s.start for s in boxes[0]])
    numbers, _ = ndimage.label(mask[boxes[0]], np.ones((3, 3, 3), bool))
    where = np.argwhere(numbers)
    owner = numbers[tuple(where.T)]
    at = np.minimum(((where + first + 0.5) * scale).astype(int), np.array(found.shape) - 1)
    there = np.isin(found[tuple(at.T)], labels.members(n))
    lost = np.isin(owner, owner[there], invert=True)
    where, at, owner = where[lost], at[lost], owner[lost]
    order = np.argsort(owner, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1) if len(order) else ():
        middle = np.argmin(((where[mine] - where[mine].mean(0)) ** 2).sum(1))
        found[tuple(at[mine][middle])] = n + 1


def _whole(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    return all(o % n == 0 for o, n in zip(old, new, strict=True))


def _smooth(tensor: torch.Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> torch.Tensor:
    """Gaussian blur matched to the shrink factor (sigma = (f - 1) / 2 voxels), left for the caller to resample."""
    from monai.networks.layers import GaussianFilter

    sigmas = [max(o / n - 1, 0) / 2 for o, n in zip(old, new, strict=True)]
    if max(sigmas) < 0.25:
        return tensor
    return GaussianFilter(3, [max(s, 1e-3) for s in sigmas])(tensor)
