"""One object on its way through the slices; stopped and gone on with at any slice."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from aslseg.compute.click_priority import held
from aslseg.prompts.corrections import enforce_clicks
from aslseg.prompts.frame import to_box
from aslseg.prompts.from_client import ClientPrompt
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.clicks.slice_mask import (
    IntensityStats,
    SliceMask,
    agree,
    components_containing,
    follows,
    neighbour_prompts,
    propagation_ranges,
)

if TYPE_CHECKING:
    from aslseg.sam.clicks.session import ClickSession

# An object ends on the slice where SAM predicts less IoU than this, where the mask's Dice with the one before is less,
# where its area is more than this many times the one before, or where its median intensity lies further than this many
# standard deviations from the clicked slices'. A correction ends where it changes a slice less than this Dice.
GROW_IOU, GROW_OVERLAP, GROW_AREA, GROW_INTENSITY, GROW_AGREEMENT = 0.5, 0.3, 2.0, 2.0, 0.98

Click = tuple[int, int, int, int]  # 1 inside or 0 outside, then the voxel


class Propagation:
    """An object on its way through the slices. Advanced by one thread at a time.

    Args:
        clicks: Whose it is.
        prompt: All clicks.
        earlier: The answer to some of them, or None.
    """

    def __init__(self, owner: ClickSession, prompt: ClientPrompt, earlier: Propagation | None) -> None:
        self.owner, self.prompt, self.box = owner, prompt, prompt.box
        self.clicks = frozenset(clicks_of(prompt))
        self.stopped, self.earlier = False, earlier is not None
        self._settled = dict(earlier.parts) if earlier else {}
        self._under = earlier.known() if earlier else {}
        self._before = earlier.prompt if earlier else None
        self._lock = threading.Lock()
        seeds = owner.seeds(prompt)
        self._seeds = frozenset(seeds)
        # a click on a slice that the object has grown through corrects what is there and does not draw it anew
        self._begun: dict[int, SliceMask | None] = dict(earlier._begun) if earlier else {}
        for k in self._seeds - earlier._seeds if earlier else ():
            self._begun[k] = self._under.get(k)
        self.parts: dict[int, SliceMask | None] = {k: self._seed(k) for k in seeds}
        values = [owner.picture.slice(k)[p.mask] for k, p in self.parts.items() if p is not None]
        self._look = IntensityStats.of(np.concatenate(values) if values else np.zeros(0))
        extent = prompt.box[2] if prompt.box is not None else (0, owner.picture.shape[2] - 1)
        self._open = deque(j for j in propagation_ranges(sorted(seeds), extent) if j[0] != j[2])

    def _seed(self, k: int) -> SliceMask:
        settled = self._settled.get(k)
        return (
            settled if settled is not None and self._same(k) else self.owner.clicked(k, self.prompt, self._begun.get(k))
        )

    @property
    def done(self) -> bool:
        """Whether nothing is left to draw."""
        return not self._open

    def known(self) -> dict[int, SliceMask | None]:
        """Every slice that was drawn, in this answer or in those it builds upon."""
        return self._under | self.parts

    def shown(self, k: int) -> np.ndarray | None:
        """The object on slice k as it is now, (i, j) bool; None: nothing there."""
        part = self.parts[k] if k in self.parts else self._under.get(k)
        if part is not None:
            return part.mask
        return self.owner.automatic_mask(k)

    def volume(self) -> np.ndarray:
        """uint8 (i, j, k), 0 or 1."""
        out = np.zeros(self.owner.picture.shape, np.uint8)
        for k in self.slices():
            mask = self.shown(k)
            if mask is not None:
                out[..., k] = mask
        return out

    def slices(self) -> list[int]:
        """Slices that may hold something."""
        return list(range(self.owner.picture.shape[2])) if self.owner.region is not None else sorted(self.known())

    def next_takes(self) -> float:
        """Seconds that the next slice is likely to take."""
        try:
            start, step, _ = self._open[0]
        except IndexError:
            return 0.0
        encode = 0.0 if self.owner.embedded(start + step) else self.owner.pace.get("encode", 0.0)
        return encode + self.owner.pace.get("step", 0.0)

    def advance(self) -> bool:
        """Draw one more slice; whether there are more."""
        with held(self._lock):
            if not self._open:
                return False
            # taken off only when its slice is there: `done` is asked meanwhile, and a step that fails can be repeated
            start, step, last = self._open[0]
            k, before = start + step, self.parts[start]
            if self.parts.get(k) is not None:  # what grows from the next clicked slice has come as far
                self._open.popleft()
                return bool(self._open)
            begun = time.perf_counter()
            ready = self.owner.embedded(k)
            part = self._grown(k, step, last, before) if before is not None else None
            if ready:
                self.owner.took("step", time.perf_counter() - begun)
            if part is None:
                # the object has ended: what was there before is not part of it, unless it is reached from elsewhere
                self.parts = dict.fromkeys(range(k, last + step, step)) | self.parts
            else:
                self.parts[k] = part
                if k != last:
                    self._open.append((k, step, last))
            self._open.popleft()
            return bool(self._open)

    def _same(self, k: int) -> bool:
        """Whether slice k has the same clicks as before."""
        return self._before is not None and {c for c in self.clicks if c[3] == k} == {
            c for c in clicks_of(self._before) if c[3] == k
        }

    def _grown(self, k: int, step: int, last: int, before: SliceMask) -> SliceMask | None:
        """The object next to a slice with ``before``; None where it ends."""
        if k in self._settled and self._settled.get(k - step) is before and self._same(k):
            return self._settled[k]
        owner, settings = self.owner, self.owner.settings
        source = before.drawn
        told = neighbour_prompts(source, *owner.points(k, self.prompt), settings, owner.scale)
        if owner.model.device.type != "cpu" and told and not owner.embedded(k):
            owner.embed(list(range(k, k + step * min(settings.sam_batch, abs(last - k) + 1), step)))
        drawn = np.zeros(owner.shape, np.float32)
        for part, (probability, iou) in zip(told, owner.ask(k, told) if told else [], strict=True):
            if iou >= GROW_IOU and follows(probability >= 0.5, source >= 0.5, GROW_OVERLAP):
                drawn = np.maximum(drawn, owner.within(probability, part.box))
        drawn = enforce_clicks(owner.within(drawn, box_of(self.prompt), margin=0), *owner.points(k, self.prompt))
        kept = replaced = None
        automatic = owner.automatic_mask(k)
        if automatic is not None:
            components, _ = ndimage.label(automatic, EIGHT_NEIGHBOURS)
            hit = (source >= 0.5) | (drawn >= 0.5) | (False if before.replaced is None else before.replaced)
            replaced = components_containing(components, hit)
            kept = (components > 0) & ~replaced
        if not self._believable(k, drawn >= 0.5, source >= 0.5):
            return None
        found = SliceMask.of(drawn, owner.margin, kept, replaced)
        then = self._under.get(k)
        if then is None and automatic is not None and agree(found.mask, automatic, GROW_AGREEMENT):
            return None
        if then is not None and self._same(k) and agree(found.mask, then.mask, GROW_AGREEMENT):
            return then
        return found

    def _believable(self, k: int, mask: np.ndarray, before: np.ndarray) -> bool:
        settings, area = self.owner.settings, int(mask.sum())
        if area * self.owner.scale**2 < settings.min_component or area > GROW_AREA * before.sum():
            return False
        return self._look.matches(self.owner.picture.slice(k)[mask], GROW_INTENSITY)


def clicks_of(prompt: ClientPrompt) -> dict[Click, None]:
    """All clicks of a prompt, in the order foreground, background."""
    parts = ((1, prompt.foreground), (0, prompt.background))
    return {(label, i, j, k): None for label, voxels in parts for i, j, k in voxels.tolist()}


def box_of(prompt: ClientPrompt) -> tuple[float, float, float, float] | None:
    """The box on every slice, as SAM has it."""
    if prompt.box is None:
        return None
    (i0, i1), (j0, j1), _ = prompt.box
    return to_box((i0, i1 + 1), (j0, j1 + 1))
