"""CFR's stitching: the slices of a volume side by side on square canvases (arXiv 2403.11229, "Concatenate").

A canvas of S x S pixels is a grid of tiles, one slice each, in the order of k, row by row; a slice's axis j runs down
the canvas and i across it. Each tile is a slice with a margin, so that the grid nearly fills the canvas. This is the
layout of CFR's code, which fails for more slices than tiles and for slices that overflow the canvas along one axis
only; here a volume takes as many canvases as it needs, the axes are independent, and no pixel of a slice is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aslseg.errors import BadSettingsError

IGNORED = 255  # label of canvas pixels that belong to no slice
CURVE_POINTS = 2000


@dataclass(frozen=True)
class Layout:
    """The places of the slices of a volume on canvases.

    Attributes:
        shape: (i, j, k) of the volume.
        size: S, edge of a canvas in pixels.
        rows: Of the grid of tiles.
        columns: Of the grid of tiles.
        margins: Around a slice in its tile, in pixels down and across.
        origin: Canvas pixel of the first tile's corner; negative where the grid is larger than the canvas.
        first: Tile of slice 0; slices that do not fill one canvas lie in its middle.
        canvases: Number of canvases.
    """

    shape: tuple[int, int, int]
    size: int
    rows: int
    columns: int
    margins: tuple[int, int]
    origin: tuple[int, int]
    first: int
    canvases: int

    @classmethod
    def of(cls, shape: tuple[int, int, int], size: int) -> Layout:
        """The layout of a volume.

        Raises:
            BadSettingsError: A slice is larger than the canvas.
        """
        i, j, k = shape
        if max(i, j) > size:
            raise BadSettingsError(
                f"slices of {i} x {j} pixels do not fit a canvas of {size}; set sam_canvas to {max(i, j)} or more, "
                "or a coarser spacing"
            )
        (rows, down, top), (columns, across, left) = _axis(j, size), _axis(i, size)
        tiles = rows * columns
        canvases = -(-k // tiles)
        return cls(shape, size, rows, columns, (down, across), (top, left), max(tiles - k, 0) // 2, canvases)

    def place(self, k: int) -> tuple[int, tuple[int, int]]:
        """Canvas of slice k, and the canvas pixel (down, across) of its corner (j, i) = (0, 0)."""
        canvas, tile = divmod(self.first + k, self.rows * self.columns)
        corner = []
        for n, number in enumerate(divmod(tile, self.columns)):
            edge = self.shape[1 - n] + 2 * self.margins[n]
            corner.append(self.origin[n] + number * edge + self.margins[n])
        return canvas, (corner[0], corner[1])

    def stitch(self, volume: np.ndarray, fill: float) -> np.ndarray:
        """A volume (i, j, k) on canvases (n, S, S) of the same type, ``fill`` where there is no slice."""
        out = np.full((self.canvases, self.size, self.size), fill, volume.dtype)
        for k in range(self.shape[2]):
            canvas, (down, across) = self.place(k)
            out[canvas, down : down + self.shape[1], across : across + self.shape[0]] = volume[..., k].T
        return out

    def cut(self, canvases: np.ndarray) -> np.ndarray:
        """The inverse: canvases (n, ..., S, S) to a volume (..., i, j, k)."""
        out = np.empty((*canvases.shape[1:-2], *self.shape), canvases.dtype)
        for k in range(self.shape[2]):
            canvas, (down, across) = self.place(k)
            tile = canvases[canvas, ..., down : down + self.shape[1], across : across + self.shape[0]]
            out[..., k] = np.swapaxes(tile, -1, -2)
        return out


def _axis(edge: int, size: int) -> tuple[int, int, int]:
    """Tiles along one axis, margin on each side of a slice, and origin of the first tile."""
    count = size // edge
    margin = round((size / count - edge) / 2)  # half to even, as CFR's code rounds
    origin = (size - count * (edge + 2 * margin)) // 2
    if margin + origin < 0:  # rounding up pushed slices over the border
        margin -= 1
        origin = (size - count * (edge + 2 * margin)) // 2
    return count, margin, origin


def monotone_map(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Map intensities by a random increasing curve from (0, 0) to (1, 1), as CFR changes the contrast.

    The curve is a cubic Bezier curve with two random control points in the unit square, whose x and y are sorted.

    Args:
        values: In 0..1, any shape; values outside are clipped.
        rng: Source of the control points.
    """
    t = np.linspace(0, 1, CURVE_POINTS)[:, None]
    controls = np.vstack([np.zeros(2), rng.random((2, 2)), np.ones(2)])
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    x, y = np.sort(weights @ controls, axis=0).T
    return np.interp(values, x, y).astype(values.dtype)
