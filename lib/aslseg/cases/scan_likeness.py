"""Scans that are unlike the labelled ones as a whole: another region of the body, turned over, or no anatomy at all.

Networks that have learned one kind of scan may both find their organ in any other one, and agree. Thumbnails of the
scans on the working grid are compared by correlation, which says what lies where and not how bright it is; intensities
are the subject of :mod:`aslseg.cases.intensity_check`.

Each rule is tried on the labelled scans first, one left out at a time. A rule that would refuse more than a few of them
does not suit these scans, and is not used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations, pairwise

import numpy as np

from aslseg.cases.prepared_case import Prepared

SIDE = 8
"""Voxels of a thumbnail along each axis."""
SAMPLES = 32
"""Planes along each axis from which it is made."""
NEAREST = 3
"""Labelled scans whose mean correlation says how alike a scan is."""
FEWEST, FEWEST_SCANS = 2, 8
"""Labelled scans, and scans in all, below which nothing is compared."""
FEWEST_TURNED = 4
"""Labelled scans below which too many scans are more alike by chance when they are turned over."""
FAR, LEAST_FAR = 5.0, 0.2
"""Robust standard deviations below the median correlation of all scans; and the least distance from it, divided by the
number of labelled scans up to four: a scan may be less like two of them by chance."""
NOTHING = 0.25
"""Part of the median correlation below which a scan shows nothing of what the others show, however these differ."""
TURNED = 0.05
"""How much more alike a scan is when it is turned over."""
FIELD = 2.0
"""Times the largest, or of the smallest, field of view of the labelled scans."""
MOST_REFUSED = 0.05
"""Part of the labelled scans that a rule may refuse."""
AXES = ("left and right", "front and back", "head and feet")
FLIPS = [axes for count in (1, 2, 3) for axes in combinations(range(3), count)]


def unlike_labelled(
    labelled: Sequence[Prepared], others: Sequence[Prepared], confirmed: Collection[str] = ()
) -> dict[str, str]:
    """Scans whose masks should not be promoted before a person has looked at them, and why.

    Args:
        labelled: Scans with a human label, on the working grid.
        others: Scans without one.
        confirmed: Case ids that ``patients.csv`` confirms.

    Returns:
        Case id of ``others`` to the reason; empty with few scans.
    """
    scans = [*labelled, *others]
    if len(labelled) < FEWEST or len(scans) < FEWEST_SCANS:
        return {}
    known, alike = len(labelled), _Likeness(scans, len(labelled))
    found: dict[str, str] = {}
    for reasons in (_far(alike), _turned(alike), _field(scans, known)):
        if sum(map(bool, reasons[:known])) > MOST_REFUSED * known:
            continue
        for case, reason in zip(others, reasons[known:], strict=True):
            if reason and case.id not in confirmed and case.id not in found:
                found[case.id] = (
                    f"{reason}; if it is right, confirm the scan in patients.csv (column intensities: confirmed)"
                )
    return found


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Means of a scan (i, j, k) over a grid of :data:`SIDE` blocks an axis."""
    small = image[tuple(slice(None, None, max(1, n // SAMPLES)) for n in image.shape)].astype(np.float64)
    for axis in range(3):
        edges = np.linspace(0, small.shape[axis], SIDE + 1).round().astype(int)
        blocks = [
            small.take(range(a, max(b, a + 1)) if a < small.shape[axis] else [-1], axis).mean(axis)
            for a, b in pairwise(edges)
        ]
        small = np.stack(blocks, axis)
    return small


class _Likeness:
    """Correlations of the thumbnails of scans, of which the first ``known`` are labelled."""

    def __init__(self, scans: Sequence[Prepared], known: int) -> None:
        self.known = known
        self.thumbnails = [thumbnail(c.image) for c in scans]
        self.fixed = _normalised(self.thumbnails[:known])
        patients = np.array([c.patient for c in scans])
        self.same = patients[:, None] == patients[None, :known]

    def __call__(self, flip: tuple[int, ...] = ()) -> np.ndarray:
        """Mean correlation of each scan, turned over along some axes, with the labelled ones most like it: (scans,).

        Labelled scans of the same patient are passed over.
        """
        correlation = _normalised([np.flip(t, flip) for t in self.thumbnails]) @ self.fixed.T
        correlation[self.same] = -np.inf
        best = np.sort(correlation, axis=1)[:, ::-1][:, :NEAREST]
        usable = np.isfinite(best)
        return np.asarray(np.where(usable, best, 0).sum(1) / np.maximum(usable.sum(1), 1))


def _normalised(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """As rows of zero mean and unit length; a row of zeros where all values are the same."""
    rows = np.stack([t.ravel() for t in thumbnails])
    rows = rows - rows.mean(1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-6)


def _far(likeness: _Likeness) -> list[str]:
    """Why each scan is too far from the labelled ones; empty where it is not."""
    alike = likeness()
    middle = np.median(alike)
    distance = FAR * 1.4826 * np.median(np.abs(alike - middle))
    least = max(middle - max(distance, LEAST_FAR / min(likeness.known, FEWEST_TURNED)), NOTHING * middle)
    return [
        f"the scan is unlike every labelled one (correlation {value:.2f}, of all scans {middle:.2f} in the middle)"
        if value < least
        else ""
        for value in alike
    ]


def _turned(likeness: _Likeness) -> list[str]:
    """Why each scan seems to be turned over; empty where it does not."""
    if likeness.known < FEWEST_TURNED:
        return [""] * len(likeness.thumbnails)
    alike, turned = likeness(), np.stack([likeness(flip) for flip in FLIPS])
    best = turned.argmax(0)
    return [
        f"the scan seems to have {' and '.join(AXES[axis] for axis in FLIPS[n])} exchanged (correlation with labelled "
        f"ones {turned[n, s]:.2f} turned over, {alike[s]:.2f} as it is)"
        if turned[n, s] > alike[s] + TURNED
        else ""
        for s, n in enumerate(best)
    ]


def _field(scans: Sequence[Prepared], known: int) -> list[str]:
    """Why each scan shows much more, or much less, than the labelled ones; empty where it does not."""
    sizes = np.array([np.multiply(c.grid.spacing, c.image.shape) for c in scans])
    found = []
    for n, size in enumerate(sizes):
        others = np.delete(sizes[:known], n, axis=0) if n < known else sizes[:known]
        low, high = others.min(0), others.max(0)
        outside = (size > FIELD * high) | (size < low / FIELD)
        text = " x ".join(f"{v:.0f}" for v in size)
        limits = ", ".join(f"{a:.0f}..{b:.0f}" for a, b in zip(low, high, strict=True))
        found.append(
            f"the scan's field of view is {text} mm, that of labelled ones {limits} mm" if outside.any() else ""
        )
    return found
