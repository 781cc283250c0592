"""The answer to the first click on an object: which of the masks that SAM offers is meant.

A lone click may mean a part, the whole or something larger, and SAM offers a mask for each. By default the one counts
for which SAM predicts the highest IoU. A click on an object that lies in another one, as a tumour in a liver, is
answered with the outer object then, since its border is the clearest on the slice. So for nested objects SAM is shown
the surroundings of the click, enlarged two and four times, and of all its masks there the one with the clearest border
counts (:func:`border_clearness`; figures in docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from aslseg.prompts.from_client import SizeStep
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.clicks.allowed_region import AllowedRegion
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.sam.predictor.zoom import Crop, crop_around, full_crop

ZOOMS = (2, 4)
LEAST_EDGE = 16  # pixels: a smaller crop shows SAM nothing but interpolation
LAST = 3.0  # subtracted from the score of masks that are only steps
STEP = 1.2  # ratio of areas from which one mask counts as larger than another
SIGMA = 2.0  # pixels, of the gradient; on slices of more than 512 pixels as many more
SIGMA_EDGE = 512
RANK_DEVIATION = 12**-0.5  # standard deviation of a rank between 0 and 1
DEVIATIONS = 2.0  # of the mean rank on a border: by so much it may be high by chance


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mask that SAM offers.

    Attributes:
        probability: (i, j) float32.
        area: Pixels that reach 0.5.
        score: The higher, the more probably it is meant.
    """

    probability: np.ndarray
    area: int
    score: float


def draw_first_click(
    predictor: SlicePredictor,
    k: int,
    point: np.ndarray,
    nested: bool,
    size: SizeStep | None = None,
    allowed: AllowedRegion | None = None,
) -> np.ndarray:
    """The object of a lone click on a slice.

    Args:
        predictor: SAM on the volume.
        k: The slice.
        point: The click (x, y), inside the object.
        nested: Whether the object lies in another one.
        size: A smaller or larger one of SAM's masks than the one that it would be otherwise; where there is none, the
            same.
        allowed: Where the object may lie; None: anywhere.

    Returns:
        Probabilities (i, j) float32.
    """
    allowed = allowed or AllowedRegion()
    found = nested_candidates(predictor, k, point, allowed) if nested else []
    if not nested or not found or size in ("larger", "largest"):
        found += plain_candidates(predictor, k, point, allowed, LAST if found else 0.0)
    return choose(found, size).probability


def choose(candidates: Sequence[Candidate], size: SizeStep | None) -> Candidate:
    """The candidate with the highest score, or the next smaller or larger one.

    Args:
        candidates: At least one.
        size: The step from there.
    """
    best = max(candidates, key=lambda c: c.score)
    smaller = sorted((c for c in candidates if 0 < STEP * c.area <= best.area), key=lambda c: -c.area)
    larger = sorted((c for c in candidates if c.area >= STEP * best.area), key=lambda c: c.area)
    if size in ("smaller", "smallest") and smaller:
        return smaller[0 if size == "smaller" else -1]
    if size in ("larger", "largest") and larger:
        return larger[0 if size == "larger" else -1]
    return best


def plain_candidates(
    predictor: SlicePredictor, k: int, point: np.ndarray, allowed: AllowedRegion, handicap: float
) -> list[Candidate]:
    """SAM's masks on the whole slice, scored by the IoU that SAM predicts minus a handicap."""
    found = []
    for probability, iou in predictor.candidates(k, point, full_crop(predictor.shape)):
        drawn = allowed.cut(k, probability)
        found.append(Candidate(drawn, int((drawn >= 0.5).sum()), iou - handicap))
    return found


def nested_candidates(predictor: SlicePredictor, k: int, point: np.ndarray, allowed: AllowedRegion) -> list[Candidate]:
    """SAM's masks on the enlarged surroundings of a click, scored by how clear their border is.

    Those that do not hold the click are left out. Of the others only the component with the click counts, without
    holes; those that are implausibly large for a nested object come after all others.
    """
    place = int(point[1]), int(point[0])
    crops = enlarged(predictor, place) or [full_crop(predictor.shape)]
    ranks = gradient_ranks(predictor.source.slice(k), crops[0])
    plausible, found = allowed.plausible_area(k, predictor.shape), []
    for crop in crops:
        for probability, _ in predictor.candidates(k, point, crop):
            drawn = one_component(allowed.cut(k, probability), place)
            mask = drawn >= 0.5
            area = int(mask.sum())
            if area:
                score = border_clearness(mask, ranks) - (area > plausible)
                found.append(Candidate(drawn, area, score))
    return found


def enlarged(predictor: SlicePredictor, place: tuple[int, int]) -> list[Crop]:
    """The parts of a slice around a place (i, j) that SAM is shown enlarged, the largest first."""
    if not predictor.settings.sam_zoom:
        return []
    middle = place[0] + 0.5, place[1] + 0.5
    return [crop_around(middle, predictor.shape, z) for z in ZOOMS if min(predictor.shape) >= z * LEAST_EDGE]


def gradient_ranks(image: np.ndarray, crop: Crop) -> np.ndarray:
    """For each pixel (i, j) the fraction of a crop's pixels whose gradient is smaller, 0..1.

    Ranks make the border of a lesion and that of its organ comparable, whatever the scan's contrast is.
    """
    gradient = ndimage.gaussian_gradient_magnitude(image, SIGMA * max(1.0, max(image.shape) / SIGMA_EDGE))
    known = np.sort(gradient[crop.index], axis=None)
    return np.searchsorted(known, gradient) / known.size


def border_clearness(mask: np.ndarray, ranks: np.ndarray) -> float:
    """How clear the border of a mask is: the mean rank of the gradient on it, times its compactness (at most 1).

    Of the mean its lower bound is taken: on the border of a mask of a few pixels it is high by chance.

    Args:
        mask: (i, j) bool, not empty.
        ranks: From :func:`gradient_ranks`.
    """
    edge = mask & ~ndimage.binary_erosion(mask)
    border = ranks[edge | (ndimage.binary_dilation(mask) & ~mask)]
    compactness = 4 * np.pi * mask.sum() / edge.sum() ** 2
    lower_bound = border.mean() - DEVIATIONS * RANK_DEVIATION / np.sqrt(border.size)
    return float(lower_bound * min(1.0, compactness))


def one_component(probability: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """Probabilities (i, j) of the component that holds a pixel, with its holes filled; all 0 if none holds it."""
    components, _ = ndimage.label(probability >= 0.5, EIGHT_NEIGHBOURS)
    number = components[place]
    if not number:
        return np.zeros_like(probability)
    mask = components == number
    filled = ndimage.binary_fill_holes(mask)
    return np.where(filled, np.maximum(probability, np.float32(filled & ~mask)), np.where(components, 0, probability))
