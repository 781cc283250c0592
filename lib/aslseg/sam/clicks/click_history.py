"""The clicks of one annotator: in which order they came, and what a request asks for on each slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from aslseg.prompts.frame import to_box, to_xy
from aslseg.prompts.from_client import ClientPrompt

MAX_CLICKS = 20_000  # whose order is remembered
MAX_POINTS = 64  # inside, and as many outside, on one slice; the last ones count


class Click(NamedTuple):
    """A click: 1 inside or 0 outside the object, and its voxel."""

    label: int
    i: int
    j: int
    k: int


def clicks_of(prompt: ClientPrompt) -> dict[Click, None]:
    """All clicks of a prompt as an ordered set: those inside the object, then those outside."""
    kinds = ((1, prompt.foreground), (0, prompt.background))
    return {Click(label, *voxel): None for label, voxels in kinds for voxel in voxels.tolist()}


class SlicedPrompt:
    """The clicks and the box of one request, slice by slice.

    Args:
        prompt: In voxels of the volume.
        order: For each click its place in the order of all clicks; those without a place come last.

    Attributes:
        prompt: As given.
        clicks: All clicks.
        box: The box on every slice as SAM takes it, (x0, y0, x1, y1) with an exclusive far side, or None.
        extent: First and last slice of the box, or None.
    """

    def __init__(self, prompt: ClientPrompt, order: Mapping[Click, int] | None = None) -> None:
        self.prompt, self._order = prompt, order or {}
        self.clicks = frozenset(clicks_of(prompt))
        self.box = self.extent = None
        if prompt.box is not None:
            (i0, i1), (j0, j1), self.extent = prompt.box
            self.box = to_box((i0, i1 + 1), (j0, j1 + 1))

    @property
    def frame(self) -> tuple[object, ...]:
        """What must be equal for one answer to be built on another: all but the clicks."""
        return self.prompt.box, self.prompt.size

    def points(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Clicks on slice k in their order: (x, y) points (n, 2), and labels (n,), 1 inside and 0 outside."""
        kinds = [v[v[:, 2] == k, :2][-MAX_POINTS:] for v in (self.prompt.foreground, self.prompt.background)]
        labels = np.repeat([1, 0], [len(kind) for kind in kinds])
        voxels = np.concatenate(kinds)
        last = len(self._order)
        clicks = zip(labels.tolist(), voxels.tolist(), strict=True)
        order = np.argsort([self._order.get(Click(label, i, j, k), last) for label, (i, j) in clicks], kind="stable")
        return to_xy(voxels[order.astype(int)]), labels[order.astype(int)]

    def changed_slices(self, earlier: SlicedPrompt) -> set[int]:
        """The slices on which an earlier request had other clicks, in whatever order."""
        return {click.k for click in self.clicks ^ earlier.clicks}


class ClickHistory:
    """Remembers the order of clicks, which no client sends. Not safe between threads."""

    def __init__(self) -> None:
        self._order: dict[Click, None] = {}

    def add(self, prompt: ClientPrompt) -> SlicedPrompt:
        """Remember the clicks that are new in a request, and give it back slice by slice.

        Clicks that a request leaves out keep their place: 2-D clients send the clicks of the slice that they show.
        """
        self._order |= clicks_of(prompt)
        for click in list(self._order)[:-MAX_CLICKS]:
            del self._order[click]
        return SlicedPrompt(prompt, {click: n for n, click in enumerate(self._order)})

    def without_last(self, prompt: ClientPrompt, count: int) -> ClientPrompt:
        """A request without the ``count`` clicks that came last; one click more takes its box away.

        Clicks that arrive together, as from a client that reconnects, count in the order inside, outside.
        """
        self.add(prompt)
        sent = clicks_of(prompt)
        order = [click for click in self._order if click in sent]
        dropped = set(order[max(len(order) - count, 0) :])
        foreground, background = (
            np.array([v for v in voxels.tolist() if Click(label, *v) not in dropped], np.int64).reshape(-1, 3)
            for label, voxels in ((1, prompt.foreground), (0, prompt.background))
        )
        box = prompt.box if count <= len(order) else None
        return replace(prompt, foreground=foreground, background=background, box=box)
