"""The clicks of one annotator on one object: from them to the whole object.

Clients send all their clicks with every request, so that clicked slices are drawn from these alone. What a session
remembers of earlier requests serves three things: slices that a further click does not reach stay as they are, a reply
may leave before the object has grown through all slices, and the order of the clicks is known. Only answers to some of
the same clicks are built upon.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from aslseg.prompts.frame import box_slices
from aslseg.prompts.from_client import ClientPrompt
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.clicks.allowed_region import AllowedRegion
from aslseg.sam.clicks.automatic_mask import AutomaticMask
from aslseg.sam.clicks.click_history import ClickHistory, SlicedPrompt
from aslseg.sam.clicks.passes import PassRunner
from aslseg.sam.clicks.propagation import Propagation
from aslseg.sam.clicks.slice_mask import SliceMask, components_containing
from aslseg.sam.predictor.slice_predictor import SlicePredictor

MAX_ANSWERS = 8  # on one object, for the next click and for undo


@dataclass(frozen=True, eq=False)
class _Answer:
    """An answer that was given.

    Attributes:
        prompt: What it answers.
        seeds: Slices that were drawn from the prompt itself.
        propagation: The object.
        repaired: For each clicked slice that the object had grown to before its first click, the mask there.
        extends: Whether it is built on an earlier answer.
    """

    prompt: SlicedPrompt
    seeds: frozenset[int]
    propagation: Propagation
    repaired: dict[int, SliceMask | None]
    extends: bool


class ClickSession:
    """Answers the clicks of one annotator on one object. Safe between threads.

    Args:
        predictor: SAM on the volume.
        automatic: The automatic mask of the object, or None. Clicks repair it: components that are clicked on are drawn
            anew with the mask as prompt, the others stay, and on other slices it stays from where the repair no longer
            changes it. An array has probabilities (i, j, k).
        nested: Whether the object lies in another one (:mod:`aslseg.sam.clicks.first_click`).
        allowed: Where the object may lie; None: anywhere.
    """

    def __init__(
        self,
        predictor: SlicePredictor,
        automatic: np.ndarray | AutomaticMask | None = None,
        nested: bool = False,
        allowed: AllowedRegion | None = None,
    ) -> None:
        self.predictor, self.settings = predictor, predictor.settings
        if isinstance(automatic, np.ndarray):
            automatic = AutomaticMask(automatic, predictor.source.shape)
        self.automatic = automatic
        self.allowed = allowed or AllowedRegion()
        self._runner = PassRunner(predictor, nested, self.allowed)
        self._history = ClickHistory()
        self._answers: deque[_Answer] = deque(maxlen=MAX_ANSWERS)
        self._box_seed: tuple[object, int] | None = None  # the last lone box, and the slice that was drawn from it
        self._lock = threading.Lock()

    def answer(self, prompt: ClientPrompt) -> np.ndarray:
        """The whole object, however long it takes.

        Args:
            prompt: Clicks and box in voxels of the volume.

        Returns:
            uint8 (i, j, k), 0 or 1; without a click inside or a box the automatic mask, or nothing.
        """
        return self.draw(prompt).volume()

    def draw(self, prompt: ClientPrompt, time_limited: bool = False, min_seconds: float = 0.0) -> Propagation:
        """The object; with a time limit only as much of it as is drawn in time, and its ``advance`` draws the rest.

        Slices with clicks are always drawn, from these and the box; with a box alone its middle slice. From there the
        object is propagated (:class:`aslseg.sam.clicks.propagation.Propagation`). Clicks outside the object count on
        their own slice only.

        Args:
            prompt: Clicks and box in voxels of the volume.
            time_limited: Propagation pauses after ``first_click_seconds``, or after ``click_seconds`` where an earlier
                answer is built upon.
            min_seconds: A longer time limit than these settings.
        """
        start = time.perf_counter()
        with self._lock:
            current = self._current_answer(self._history.add(prompt))
            for other in self._answers:
                other.propagation.cancelled = True
            current.propagation.cancelled = False
            self._answers.append(current)
        seconds = self.settings.click_seconds if current.extends else self.settings.first_click_seconds
        deadline, found = start + max(seconds, min_seconds), current.propagation
        while not found.done and not (time_limited and time.perf_counter() + found.expected_seconds() > deadline):
            found.advance()
        return found

    def on_slice(self, prompt: ClientPrompt) -> tuple[int, np.ndarray] | None:
        """The slice k that the prompt is about and the object there, (i, j) bool; None without prompt on any slice."""
        with self._lock:
            sliced = self._history.add(prompt)
        k = self.current_slice(prompt)
        return None if k is None else (k, self.allowed.without_finished(k, self._draw_clicked(k, sliced).mask))

    def current_slice(self, prompt: ClientPrompt) -> int | None:
        """The slice k that the prompt is about, None without prompt on any slice."""
        seeds = self._seed_slices(prompt)
        return prompt.slice if prompt.slice in seeds else next(reversed(seeds), None)

    def without_last(self, prompt: ClientPrompt, count: int) -> ClientPrompt:
        """A prompt without the clicks that came last, see :meth:`ClickHistory.without_last`."""
        with self._lock:
            return self._history.without_last(prompt, count)

    @property
    def bytes(self) -> int:
        """Bytes of the answers in memory."""
        known = [mask for a in list(self._answers) for mask in a.propagation.known().values() if mask is not None]
        return sum({id(mask): mask.bytes for mask in known}.values()) + self._runner.bytes + self.allowed.bytes

    def _current_answer(self, prompt: SlicedPrompt) -> _Answer:
        """The remembered answer to the same prompt, taken off the list, or a new one on the best earlier answer."""
        comparable = [a for a in self._answers if a.prompt.frame == prompt.frame]
        same = next((a for a in comparable if a.prompt.clicks == prompt.clicks), None)
        if same is not None:
            self._answers.remove(same)
            return same
        earlier = [a for a in comparable if a.prompt.clicks < prompt.clicks]
        return self._begin(prompt, max(earlier, key=lambda a: len(a.prompt.clicks), default=None))

    def _begin(self, prompt: SlicedPrompt, earlier: _Answer | None) -> _Answer:
        """Draw the seed slices; those whose clicks are the same as before stay as they are."""
        slices = self._seed_slices(prompt.prompt)
        repaired: dict[int, SliceMask | None] = {}
        settled: dict[int, SliceMask] = {}
        before = None if earlier is None else earlier.propagation
        if earlier is not None and before is not None:
            known, changed = before.known(), prompt.changed_slices(earlier.prompt)
            repaired = earlier.repaired | {k: known.get(k) for k in slices if k not in earlier.seeds}
            settled = {k: m for k, m in before.masks.items() if m is not None and k not in changed}
        seeds = {k: settled[k] if k in settled else self._draw_clicked(k, prompt, repaired.get(k)) for k in slices}
        propagation = Propagation(
            self.predictor, seeds, self.automatic, prompt=prompt, earlier=before, allowed=self.allowed
        )
        return _Answer(prompt, frozenset(slices), propagation, repaired, extends=before is not None)

    def _seed_slices(self, prompt: ClientPrompt) -> list[int]:
        """Slices that are drawn from the prompt itself, in the order in which they were clicked."""
        slices = list(dict.fromkeys(prompt.foreground[:, 2].tolist()))
        if self.automatic is not None:
            outside = dict.fromkeys(prompt.background[:, 2].tolist())
            slices += [k for k in outside if k not in slices and self._hits_automatic(k, prompt)]
        if prompt.box is None:
            return slices
        seed = self._box_seed[1] if self._box_seed is not None and self._box_seed[0] == prompt.box else None
        if not slices:
            low, high = prompt.box[2]
            middle = prompt.slice if prompt.slice is not None and low <= prompt.slice <= high else (low + high) // 2
            if seed is None:
                self._box_seed = (prompt.box, middle)
            return [middle]
        # clicks that follow a lone box correct the answer to it and do not take its place
        return [seed, *slices] if seed is not None and seed not in slices else slices

    def _hits_automatic(self, k: int, prompt: ClientPrompt) -> bool:
        """Whether a click outside the object on slice k contradicts the automatic mask."""
        found = None if self.automatic is None else self.automatic.mask(k)
        clicked = prompt.background[prompt.background[:, 2] == k]
        return found is not None and bool(found[clicked[:, 0], clicked[:, 1]].any())

    def _draw_clicked(self, k: int, prompt: SlicedPrompt, repaired: SliceMask | None = None) -> SliceMask:
        """The object on a slice with clicks, drawn anew or by repairing the mask that is there.

        Args:
            k: The slice.
            prompt: All clicks and the box.
            repaired: What had grown there before the first of these clicks; it takes the place of the automatic mask.
        """
        points, labels = prompt.points(k)
        existing = repaired.shown if repaired is not None else self._automatic(k)
        if existing is None:
            return self._slice_mask(self._runner.draw(k, prompt.box, points, labels, None, prompt.prompt.size))
        components, _ = ndimage.label(existing >= 0.5, EIGHT_NEIGHBOURS)
        hit = np.zeros(self.predictor.shape, bool)
        hit[tuple(points[:, ::-1].astype(int).T)] = True
        if prompt.box is not None:
            hit[box_slices(prompt.box, 0, self.predictor.shape)] = True
        replaced = components_containing(components, hit)
        kept = (components > 0) & ~replaced
        start = np.where(replaced, existing, 0).astype(np.float32) if replaced.any() else None
        inside = points[labels == 1].astype(int)
        beside = prompt.box is None and len(inside) and not replaced[inside[:, 1], inside[:, 0]].any()
        if start is not None and beside:
            # clicks outside repair what is there; those inside are about an object that is lacking
            outside = labels == 0
            left = self._runner.draw(k, None, points[outside], labels[outside], start)
            found = np.maximum(left, self._runner.draw(k, None, points, labels, None, prompt.prompt.size))
        else:
            found = self._runner.draw(k, prompt.box, points, labels, start, prompt.prompt.size)
        if repaired is None:
            return self._slice_mask(found, kept, replaced)
        # what had grown there goes on growing; only components of the automatic mask stay beside it
        automatic = kept & repaired.kept if repaired.kept is not None else np.zeros_like(kept)
        found = np.maximum(found, np.where(kept & ~automatic, existing, 0))
        both = None if repaired.replaced is None else repaired.replaced | replaced
        return self._slice_mask(found, automatic if automatic.any() else None, both)

    def _slice_mask(
        self, probability: np.ndarray, kept: np.ndarray | None = None, replaced: np.ndarray | None = None
    ) -> SliceMask:
        return SliceMask.of(probability, self.settings.box_margin / self.predictor.scale, kept, replaced)

    def _automatic(self, k: int) -> np.ndarray | None:
        return None if self.automatic is None else self.automatic.probability(k)
