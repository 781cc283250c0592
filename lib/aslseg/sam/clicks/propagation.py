"""An object through the slices: the mask on one slice prompts SAM on the next, until a rule stops it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from aslseg.compute.click_priority import acquire
from aslseg.prompts.corrections import enforce_clicks
from aslseg.prompts.frame import SlicePrompt
from aslseg.prompts.from_client import ClientPrompt
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS, slice_prompts
from aslseg.sam.clicks.allowed_region import AllowedRegion
from aslseg.sam.clicks.automatic_mask import AutomaticMask
from aslseg.sam.clicks.click_history import SlicedPrompt
from aslseg.sam.clicks.slice_mask import IntensityStats, SliceMask, components_containing
from aslseg.sam.clicks.stop_rules import (
    COMPONENT_RULES,
    SLICE_RULES,
    GrownComponent,
    GrownSlice,
    StopReason,
    StopRules,
    agree,
    first_reason,
)
from aslseg.sam.predictor.slice_predictor import SlicePredictor


@dataclass(frozen=True)
class Front:
    """A place where the object grows.

    Attributes:
        k: The last slice that is drawn.
        step: 1 or -1.
        last: The last slice to draw.
    """

    k: int
    step: int
    last: int


@dataclass(frozen=True)
class Stop:
    """Where the object ended: the last slice that it has in the direction ``step``, and why."""

    k: int
    step: int
    reason: StopReason


class Propagation:
    """Grows an object from its seed slices, one slice at each :meth:`advance`. Advanced by one thread at a time.

    Args:
        predictor: Answers prompts on the slices.
        seeds: The object on slices that are drawn already.
        automatic: A mask that is repaired, or None. Its components stay where the object does not touch them, and all
            of it stays from the slice on that the repair no longer changes.
        rules: Limits of what stops the object; by default those of the predictor's settings.
        prompt: Clicks and box: clicks count on their own slices too where these are no seeds, and nothing is drawn
            outside the box.
        earlier: A propagation that this one corrects: slices whose prompts are the same stay as they are.
        allowed: Where the object may lie; None: anywhere.

    Attributes:
        masks: The object on each slice that was reached; None: it has ended.
        stops: Where and why it ended.
        cancelled: Set by the owner when nobody wants the rest any more.
    """

    def __init__(
        self,
        predictor: SlicePredictor,
        seeds: Mapping[int, SliceMask],
        automatic: AutomaticMask | None = None,
        rules: StopRules | None = None,
        prompt: SlicedPrompt | None = None,
        earlier: Propagation | None = None,
        allowed: AllowedRegion | None = None,
    ) -> None:
        self.predictor, self.automatic = predictor, automatic
        self.rules = rules or StopRules.from_settings(predictor.settings)
        self.prompt, self.allowed = prompt or SlicedPrompt(ClientPrompt()), allowed or AllowedRegion()
        self.masks: dict[int, SliceMask | None] = dict(seeds)
        self.stops: list[Stop] = []
        self.cancelled = False
        self._earlier_masks = dict(earlier.masks) if earlier else {}
        self._earlier_stops = {(s.k, s.step): s.reason for s in earlier.stops} if earlier else {}
        self._underlying = earlier.known() if earlier else {}
        self._changed = self.prompt.changed_slices(earlier.prompt) if earlier else set()
        self._lock = threading.Lock()
        values = [predictor.source.slice(k)[mask.mask] for k, mask in seeds.items()]
        self._intensity = IntensityStats.of(np.concatenate(values) if values else np.zeros(0))
        self._fronts: deque[tuple[Front, SliceMask]] = deque()  # with the mask on the last slice of each
        for front in propagation_ranges(sorted(seeds), self._extent):
            if front.k == front.last:
                self.stops.append(Stop(front.k, front.step, self._end(front)))
            else:
                self._fronts.append((front, seeds[front.k]))

    @property
    def done(self) -> bool:
        """Whether nothing is left to draw."""
        return not self._fronts

    @property
    def _extent(self) -> tuple[int, int]:
        return self.prompt.extent or (0, self.predictor.depth - 1)

    def known(self) -> dict[int, SliceMask | None]:
        """Every slice that was reached, here or in the propagations that this one corrects."""
        return self._underlying | self.masks

    def mask(self, k: int) -> np.ndarray | None:
        """The object on slice k as it is now, (i, j) bool; None: nothing is there."""
        found = self.masks[k] if k in self.masks else self._underlying.get(k)
        mask = found.mask if found is not None else None
        if found is None and self.automatic is not None:
            mask = self.automatic.mask(k)
        return None if mask is None else self.allowed.without_finished(k, mask)

    def volume(self) -> np.ndarray:
        """uint8 (i, j, k), 0 or 1."""
        out = np.zeros(self.predictor.source.shape, np.uint8)
        for k in self.slices():
            mask = self.mask(k)
            if mask is not None:
                out[..., k] = mask
        return out

    def slices(self) -> list[int]:
        """Slices that may show something."""
        return list(range(self.predictor.depth)) if self.automatic is not None else sorted(self.known())

    def expected_seconds(self) -> float:
        """How long the next slice probably takes."""
        try:
            front, _ = self._fronts[0]
        except IndexError:  # another thread drew the last slice
            return 0.0
        return self.predictor.expected_seconds(front.k + front.step)

    def advance(self) -> bool:
        """Draw one more slice. Returns whether there are more.

        A step that fails leaves everything as it was and can be repeated.
        """
        with acquire(self._lock):
            if not self._fronts:
                return False
            front, before = self._fronts[0]
            k = front.k + front.step
            if self.masks.get(k) is not None:
                self.stops.append(Stop(front.k, front.step, StopReason.MET_NEIGHBOUR))
            else:
                self._place(front, self._timed_grow(k, front, before))
            # `done` is read by other threads: the front leaves only when its slice is there
            self._fronts.popleft()
            return bool(self._fronts)

    def _place(self, front: Front, found: SliceMask | StopReason) -> None:
        """Enter what was found on the slice after a front."""
        k = front.k + front.step
        if isinstance(found, StopReason):
            self.stops.append(Stop(front.k, front.step, found))
            # an earlier mask beyond the end is no part of the object any more, unless another front reaches it
            self.masks = dict.fromkeys(range(k, front.last + front.step, front.step)) | self.masks
            return
        self.masks[k] = found
        moved = Front(k, front.step, front.last)
        if k == front.last:
            self.stops.append(Stop(k, front.step, self._end(moved)))
        else:
            self._fronts.append((moved, found))

    def _end(self, front: Front) -> StopReason:
        """Why a front goes no farther than its last slice."""
        first, last = self._extent
        if front.last != (last if front.step > 0 else first):
            return StopReason.MET_NEIGHBOUR
        return StopReason.BOX_END if self.prompt.extent else StopReason.VOLUME_END

    def _timed_grow(self, k: int, front: Front, before: SliceMask) -> SliceMask | StopReason:
        start, embedded = time.perf_counter(), self.predictor.is_embedded(k)
        found = self._grow(k, front, before)
        if embedded:
            self.predictor.record("step", time.perf_counter() - start)
        return found

    def _grow(self, k: int, front: Front, before: SliceMask) -> SliceMask | StopReason:
        """The object on slice k, next to a slice with ``before``, or why it ends there."""
        if k in self._earlier_masks and self._earlier_masks.get(front.k) is before and k not in self._changed:
            settled = self._earlier_masks[k]
            ended = self._earlier_stops.get((front.k, front.step), StopReason.AS_BEFORE)
            return ended if settled is None else settled
        source = before.drawn
        drawn, rejected = self._draw(k, front, source)
        kept = replaced = None
        automatic = self.automatic.mask(k) if self.automatic is not None else None
        if automatic is not None:
            components, _ = ndimage.label(automatic, EIGHT_NEIGHBOURS)
            replaced = components_containing(components, self._redrawn(front, before))
            kept = (components > 0) & ~replaced
        found = SliceMask.of(drawn, self.predictor.settings.box_margin / self.predictor.scale, kept, replaced)
        underlying, mask = self._underlying.get(k), drawn >= 0.5
        grown = GrownSlice(
            mask=mask,
            before=source >= 0.5,
            scale=self.predictor.scale,
            intensities=lambda: self.predictor.source.slice(k)[mask],
            clicked=self._intensity,
            shown=found.mask,
            automatic=automatic if underlying is None else None,
            staying=kept,
        )
        reason = first_reason(SLICE_RULES, grown, self.rules)
        if reason is not None:
            return rejected if rejected is not None and not mask.any() else reason
        if underlying is not None and k not in self._changed:
            return underlying if agree(found.mask, underlying.mask, self.rules.agreement) else found
        return found

    def _redrawn(self, front: Front, before: SliceMask) -> np.ndarray:
        """What the automatic mask has on the slice of a front and the object replaces or overlaps, (i, j) bool.

        The components that go on from there are drawn anew. All others stay.
        """
        automatic = self.automatic.mask(front.k) if self.automatic is not None else None
        inside = before.drawn >= 0.5
        overlapped = np.zeros_like(inside) if automatic is None else automatic & inside
        return overlapped if before.replaced is None else overlapped | before.replaced

    def _draw(self, k: int, front: Front, source: np.ndarray) -> tuple[np.ndarray, StopReason | None]:
        """SAM's answers to the components of the slice before, without those that a rule rejects.

        Args:
            k: The slice to draw.
            front: Where it is reached from.
            source: Probabilities (i, j) on the slice before.

        Returns:
            Probabilities (i, j) with all clicks on the slice enforced, and why a component was rejected, if one was.
        """
        predictor, clicks = self.predictor, self.prompt.points(k)
        drawn, rejected = np.zeros(predictor.shape, np.float32), None
        prompts = neighbour_prompts(predictor, source, *clicks)
        if prompts:
            predictor.embed_ahead(k, front.step, front.last)
        for prompt, (probability, iou) in zip(prompts, predictor.predict(k, prompts), strict=True):
            component = GrownComponent(probability >= 0.5, source >= 0.5, iou)
            reason = first_reason(COMPONENT_RULES, component, self.rules)
            if reason is None:
                drawn = np.maximum(drawn, self.allowed.cut(k, predictor.keep_in_box(probability, prompt.box)))
            else:
                rejected = rejected or reason
        drawn = enforce_clicks(predictor.keep_in_box(drawn, self.prompt.box, margin=0), *clicks)
        return self.allowed.cut(k, drawn), rejected


def neighbour_prompts(
    predictor: SlicePredictor, before: np.ndarray, points: np.ndarray, labels: np.ndarray
) -> list[SlicePrompt]:
    """Prompts for a slice from the object's probabilities (i, j) on the slice before it and the clicks on its own."""
    return [
        SlicePrompt(
            prompt.box,
            np.concatenate([prompt.points, points]),
            np.concatenate([prompt.point_labels, labels]),
            prompt.mask,
        )
        for prompt in slice_prompts(before >= 0.5, before, predictor.settings, predictor.scale)
    ]


def propagation_ranges(seeds: list[int], extent: tuple[int, int]) -> Iterator[Front]:
    """Fronts away from every seed slice, each at most to the next seed and within ``extent``."""
    for n, k in enumerate(seeds):
        if extent[0] <= k <= extent[1]:
            yield Front(k, 1, min(extent[1], seeds[n + 1] - 1 if n + 1 < len(seeds) else extent[1]))
            yield Front(k, -1, max(extent[0], seeds[n - 1] + 1 if n else extent[0]))
