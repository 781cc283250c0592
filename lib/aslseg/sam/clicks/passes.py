"""The passes of SAM that turn the clicks on one slice into a mask.

Clicks are taken one after the other, each together with those before it and with the answer to them as mask prompt
(SAM-Med2D, arXiv 2308.16184, section 3). :func:`plan_passes` says which passes that takes, :class:`PassRunner` runs
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from aslseg.prompts.corrections import enforce_clicks, remove_stray_components
from aslseg.prompts.frame import SlicePrompt
from aslseg.prompts.from_client import SizeStep
from aslseg.sam.clicks.allowed_region import AllowedRegion
from aslseg.sam.clicks.first_click import draw_first_click
from aslseg.sam.predictor.slice_predictor import SlicePredictor

SINGLE_CLICKS = 8  # as many clicks are taken one by one, those after them in groups of as many
MAX_ANSWERS = 32  # to the first clicks on a slice, kept for the next click and for undo

Box = tuple[float, float, float, float]


class MaskPrompt(Enum):
    """Which mask is shown to SAM."""

    NONE = "none"
    START = "start"  # the mask that the clicks repair
    PREVIOUS = "previous"  # the answer so far


class ObjectSize(Enum):
    """Whether the object of the answer so far is also looked at enlarged (:mod:`aslseg.sam.predictor.zoom`)."""

    SMALL = "small"
    LARGE = "large"


@dataclass(frozen=True)
class ClickPass:
    """One pass of SAM over a slice.

    Attributes:
        clicks: How many clicks are shown, from the first on.
        mask: The mask prompt.
        chosen: The answer is one of all the masks that SAM offers (:mod:`aslseg.sam.clicks.first_click`).
        ellipse: As :func:`aslseg.sam.predictor.slice_predictor.predict_masks`.
        only: The pass is skipped for objects of another size; None: it always runs.
        averaged: The answers of all passes like this one and the answer before them are averaged; otherwise the answer
            takes the place of the one before.
    """

    clicks: int
    mask: MaskPrompt
    chosen: bool = False
    ellipse: bool = True
    only: ObjectSize | None = None
    averaged: bool = False


def plan_passes(
    labels: Sequence[int], *, box: bool, start: bool, ellipses: bool, chosen: bool = False
) -> list[ClickPass]:
    """The passes for the clicks on a slice, in their order.

    After the clicks, SAM is asked once more where that shows it something new: an object of clicks alone that turns out
    to be small is looked at enlarged, and a large object in a box without clicks, of which little is known, is the mean
    of several answers.

    Args:
        labels: Of the clicks, 1 inside and 0 outside. Where no mask is repaired, one inside the object comes first.
        box: Whether there is a box.
        start: Whether a mask is repaired.
        ellipses: Whether the SAM knows the ellipse in a box as mask prompt.
        chosen: Whether the answer to a first click that comes without box and mask is one of all that SAM offers.
    """
    total = len(labels)
    if not start and not box and 1 not in labels:
        return []
    counts = [n for n in range(1, total) if _has_own_pass(n)] + [total]
    if not start and total and not labels[0]:
        counts.insert(0, 0)  # the box alone, before clicks that are all outside
    first, *further = counts
    passes = [ClickPass(first, MaskPrompt.START if start else MaskPrompt.NONE, chosen and not start and not box)]
    passes += [ClickPass(n, MaskPrompt.PREVIOUS) for n in further]
    if passes[-1].chosen:
        return passes
    if not box:
        return [*passes, ClickPass(total, MaskPrompt.PREVIOUS, only=ObjectSize.SMALL)]
    if start or further:
        return passes
    passes.append(ClickPass(total, MaskPrompt.PREVIOUS, only=ObjectSize.LARGE, averaged=ellipses))
    if ellipses:
        passes.append(ClickPass(total, MaskPrompt.NONE, ellipse=False, only=ObjectSize.LARGE, averaged=True))
    return passes


class PassRunner:
    """Draws slices from their clicks. Remembers the answers to the first clicks, for the next click and for undo.

    Args:
        predictor: SAM on the volume.
        nested: Whether the object lies in another one, which a first click would select otherwise.
        allowed: Where the object may lie; nothing is drawn elsewhere.
    """

    def __init__(self, predictor: SlicePredictor, nested: bool = False, allowed: AllowedRegion | None = None) -> None:
        self.predictor, self.nested, self.allowed = predictor, nested, allowed or AllowedRegion()
        self._answers: dict[tuple[object, ...], np.ndarray] = {}

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return sum(answer.nbytes for answer in list(self._answers.values()))

    def draw(
        self,
        k: int,
        box: Box | None,
        points: np.ndarray,
        labels: np.ndarray,
        start: np.ndarray | None,
        size: SizeStep | None = None,
    ) -> np.ndarray:
        """Draw an object from the clicks on a slice.

        The clicks are enforced on every answer (:func:`aslseg.prompts.corrections.enforce_clicks`) before it becomes
        the mask prompt of the next pass.

        Args:
            k: The slice.
            box: From the annotator, or None; nothing is drawn outside of it.
            points: (x, y) in the order of the clicks, (n, 2).
            labels: 1 inside, 0 outside, (n,).
            start: Probabilities (i, j) of the mask that is repaired, or None.
            size: For a first click without box and mask: a smaller or larger mask than the one that SAM would be asked
                for (:func:`aslseg.sam.clicks.first_click.choose`).

        Returns:
            Probabilities (i, j).
        """
        if start is None:
            points, labels = _inside_first(points, labels)
        plan = plan_passes(
            labels.tolist(),
            box=box is not None,
            start=start is not None,
            ellipses=self.predictor.model.conventions.box_mask,
            chosen=self.nested or size is not None,
        )
        answer, averaged = np.zeros(self.predictor.shape, np.float32), []
        complete = SlicePrompt(box, points, labels)
        for one in plan:
            if one.only is not None and one.only is not self._size(replace(complete, mask=answer)):
                continue
            mask = {MaskPrompt.NONE: None, MaskPrompt.START: start, MaskPrompt.PREVIOUS: answer}[one.mask]
            prompt = SlicePrompt(box, points[: one.clicks], labels[: one.clicks], mask)
            found = self._run(k, one, prompt, start, size)
            if one.averaged:
                averaged.append(found)
            else:
                answer = found
        return remove_stray_components(np.mean([answer, *averaged], 0), points, labels) if averaged else answer

    def _size(self, prompt: SlicePrompt) -> ObjectSize:
        return ObjectSize.LARGE if len(self.predictor.crops([prompt])) == 1 else ObjectSize.SMALL

    def _run(
        self, k: int, one: ClickPass, prompt: SlicePrompt, start: np.ndarray | None, size: SizeStep | None
    ) -> np.ndarray:
        """The answer of one pass; those to the first clicks are remembered."""
        if one.only is not None:
            return self._predict(k, one, prompt, start, size)
        repaired = b"" if start is None else np.packbits(start >= 0.5).tobytes()
        key = (k, prompt.box, prompt.points.tobytes(), prompt.point_labels.tobytes(), repaired, size)
        answer = self._answers.get(key)
        if answer is None:
            answer = self._predict(k, one, prompt, start, size)
            if _has_own_pass(one.clicks):
                self._answers[key] = answer
            while len(self._answers) > MAX_ANSWERS:
                self._answers.pop(next(iter(self._answers)), None)
        return answer

    def _predict(
        self, k: int, one: ClickPass, prompt: SlicePrompt, start: np.ndarray | None, size: SizeStep | None
    ) -> np.ndarray:
        """SAM's probabilities (i, j), cut to where the object may lie, with clicks enforced and no stray components.

        Where a mask is repaired its components are no strays, and all of them stay.
        """
        predictor, clicks = self.predictor, (prompt.points, prompt.point_labels)
        if one.chosen:
            drawn = draw_first_click(predictor, k, prompt.points[0], self.nested, size, self.allowed)
        else:
            [(drawn, _)] = predictor.predict(k, [prompt], one.ellipse)
        drawn = self._cut(k, enforce_clicks(self._cut(k, drawn, prompt.box), *clicks), prompt.box)
        return drawn if start is not None else remove_stray_components(drawn, *clicks)

    def _cut(self, k: int, drawn: np.ndarray, box: Box | None) -> np.ndarray:
        return self.allowed.cut(k, self.predictor.keep_in_box(drawn, box, margin=0))


def _has_own_pass(clicks: int) -> bool:
    """Whether the answer to so many clicks is the mask prompt of the next ones."""
    return clicks <= SINGLE_CLICKS or clicks % SINGLE_CLICKS == 0


def _inside_first(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clicks with the first one inside the object in front: without it SAM cannot know which object is meant."""
    inside = np.flatnonzero(labels == 1)
    if not len(inside):
        return points, labels
    order = np.r_[inside[0], np.delete(np.arange(len(labels)), inside[0])]
    return points[order], labels[order]
