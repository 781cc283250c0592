"""What stops an object that is propagated from slice to slice.

Each rule is a function that returns the reason to stop, or None. :data:`COMPONENT_RULES` judge SAM's answer to one
component of the object; a rejected component is left out of the slice. :data:`SLICE_RULES` judge the slice that is
left; there the object ends. To change what stops an object, change a rule, its limit in :class:`StopRules`, or a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import numpy as np
from scipy import ndimage

from aslseg.compute.overlap import dice
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.clicks.slice_mask import IntensityStats
from aslseg.settings import Settings


class StopReason(StrEnum):
    """Why an object ends at a slice."""

    PREDICTED_IOU = "the IoU that SAM predicts is too low"
    NO_OVERLAP = "the mask overlaps too little with the slice before"
    NOTHING_LEFT = "nothing is left of the object"
    AREA = "the area grows too much"
    INTENSITY = "the intensities differ from those of the clicked slices"
    AGREES = "the automatic mask says the same"
    MET_AUTOMATIC = "it meets the automatic mask, which goes on"
    MET_NEIGHBOUR = "it meets what grows from the next clicked slice"
    BOX_END = "the box ends"
    VOLUME_END = "the volume ends"
    AS_BEFORE = "it ended here before, and nothing has changed"


@dataclass(frozen=True)
class StopRules:
    """The limits of the rules.

    Attributes:
        predicted_iou: Least IoU that SAM predicts.
        overlap: Least Dice between a component and the one that it was grown from.
        area_ratio: Largest area, as a multiple of that of the slice before.
        intensity: Largest distance between the median intensities of a slice and of the clicked slices, in standard
            deviations of the latter.
        agreement: Dice from which two masks count as the same.
        known: Largest fraction of a slice that may lie in components of the automatic mask that stay.
        min_area: Least area in pixels of SAM's input.
    """

    predicted_iou: float = 0.5
    overlap: float = 0.3
    area_ratio: float = 2.0
    intensity: float = 2.0
    agreement: float = 0.98
    known: float = 0.5
    min_area: float = 9.0

    @classmethod
    def from_settings(cls, settings: Settings) -> StopRules:
        """The rules with the ``min_component`` of the settings."""
        return cls(min_area=settings.min_component)


@dataclass(frozen=True, eq=False)
class GrownComponent:
    """SAM's answer on a slice to the prompt from one component on the slice before.

    Attributes:
        mask: The answer (i, j), bool.
        before: The whole object on the slice before (i, j), bool.
        predicted_iou: From SAM.
    """

    mask: np.ndarray
    before: np.ndarray
    predicted_iou: float


@dataclass(frozen=True, eq=False)
class GrownSlice:
    """The object on a slice, from all components that were accepted.

    Attributes:
        mask: What was drawn (i, j), bool.
        before: The object on the slice before (i, j), bool.
        scale: Pixels of SAM's input per pixel of the slice.
        intensities: Returns those of the pixels in ``mask``, (n,) in 0..1.
        clicked: Intensities of the object on the clicked slices.
        shown: The object with the components of the automatic mask that stay beside it (i, j), bool.
        automatic: The automatic mask (i, j), bool, where agreement with it ends the propagation; else None.
        staying: Components of the automatic mask that stay beside what was drawn (i, j), bool, or None.
    """

    mask: np.ndarray
    before: np.ndarray
    scale: float
    intensities: Callable[[], np.ndarray]
    clicked: IntensityStats
    shown: np.ndarray
    automatic: np.ndarray | None = None
    staying: np.ndarray | None = None


T = TypeVar("T")
Rule = Callable[[T, StopRules], StopReason | None]


def low_predicted_iou(grown: GrownComponent, limits: StopRules) -> StopReason | None:
    """SAM does not trust its own mask."""
    return StopReason.PREDICTED_IOU if grown.predicted_iou < limits.predicted_iou else None


def no_overlap(grown: GrownComponent, limits: StopRules) -> StopReason | None:
    """The mask has moved away, by Dice, from the components of the slice before that it touches."""
    components, _ = ndimage.label(grown.before, EIGHT_NEIGHBOURS)
    origin = np.isin(components, np.unique(components[grown.mask & grown.before]))
    total = grown.mask.sum() + origin.sum()
    overlaps = bool(total) and 2 * (grown.mask & origin).sum() / total >= limits.overlap
    return None if overlaps else StopReason.NO_OVERLAP


def nothing_left(grown: GrownSlice, limits: StopRules) -> StopReason | None:
    """The mask is empty or smaller than what may prompt SAM."""
    area = int(grown.mask.sum())
    return StopReason.NOTHING_LEFT if not area or area * grown.scale**2 < limits.min_area else None


def area_jumps(grown: GrownSlice, limits: StopRules) -> StopReason | None:
    """The mask has leaked into something larger."""
    return StopReason.AREA if int(grown.mask.sum()) > limits.area_ratio * grown.before.sum() else None


def other_intensity(grown: GrownSlice, limits: StopRules) -> StopReason | None:
    """The mask shows another tissue: beyond the end of an object SAM tends to copy the mask that prompts it."""
    return None if grown.clicked.matches(grown.intensities(), limits.intensity) else StopReason.INTENSITY


def agrees_with_automatic(grown: GrownSlice, limits: StopRules) -> StopReason | None:
    """The correction no longer changes the automatic mask, which stays from here on."""
    if grown.automatic is not None and agree(grown.shown, grown.automatic, limits.agreement):
        return StopReason.AGREES
    return None


def met_automatic(grown: GrownSlice, limits: StopRules) -> StopReason | None:
    """The automatic mask, which lacked the object so far, has it from here on."""
    if grown.staying is None:
        return None
    known = int((grown.mask & grown.staying).sum())
    return StopReason.MET_AUTOMATIC if known > limits.known * grown.mask.sum() else None


COMPONENT_RULES: tuple[Rule[GrownComponent], ...] = (low_predicted_iou, no_overlap)
SLICE_RULES: tuple[Rule[GrownSlice], ...] = (
    nothing_left,
    met_automatic,
    area_jumps,
    other_intensity,
    agrees_with_automatic,
)


def first_reason(rules: Iterable[Rule[T]], grown: T, limits: StopRules) -> StopReason | None:
    """The reason of the first rule that has one."""
    return next((reason for rule in rules if (reason := rule(grown, limits)) is not None), None)


def agree(one: np.ndarray, other: np.ndarray, min_dice: float) -> bool:
    """Whether two masks (i, j) are, by Dice, the same; two empty ones are."""
    found = dice(one, other)
    return found is None or found >= min_dice
