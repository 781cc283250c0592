"""An annotator's clicks to a whole object: the clicked slices first, then slice by slice away from them.

Clients send all their clicks with every request, so clicked slices are drawn from these alone. What is remembered of
an annotator's earlier requests on the same object serves three things: slices that a further click does not reach stay
as they are, an answer may leave before the object is grown through all slices, and the order of the clicks is known.
Only answers to a part of the same clicks are built upon.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from aslseg.compute.click_priority import clock
from aslseg.prompts.corrections import enforce_clicks, remove_stray_components
from aslseg.prompts.frame import SlicePrompt, box_slices, to_xy
from aslseg.prompts.from_client import ClientPrompt
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.clicks.propagation import Click, Propagation, box_of, clicks_of
from aslseg.sam.clicks.slice_mask import SliceMask, components_containing
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embeddings import EmbeddingCache
from aslseg.sam.predictor.predict import LEAK_MARGIN, answer
from aslseg.sam.predictor.slices import Region, SliceSource
from aslseg.sam.predictor.zoom import Crop, crops_for, merge_crops
from aslseg.settings import Settings

EMBEDDINGS = EmbeddingCache()  # shared by all annotators: it holds images, not answers
MOST_CLICKS = 20_000  # whose order is known
MOST_POINTS = 64  # on one slice; the last ones count
REMEMBERED = 8  # answers on one object, for the next click and for undo
SINGLY = 8  # clicks on a slice that are taken one by one; those after them in groups of as many
STEPS = 32  # answers to some of the clicks on a slice, for the next click and for undo


class ClickSession:
    """Answers one annotator's clicks on one object of one image. Safe between threads.

    Args:
        model: SAM.
        image: (i, j, k) float32 in 0..1, or a picture of a scan.
        settings: ``box_margin``, ``min_component``, ``grow_*`` and what prompts are made of.
        ssl_region: (i, j, k) float32 probability of the object from the SSL model, or None. Where it is there, clicks
            repair it: components that are clicked on are drawn anew with the mask as prompt, the others stay, and on
            other slices it stays from where the correction no longer changes it.
        cache: Embeddings; by default those shared by all.
    """

    def __init__(
        self,
        model: SAMModel,
        image: np.ndarray | SliceSource,
        settings: Settings,
        ssl_region: np.ndarray | Region | None = None,
        cache: EmbeddingCache = EMBEDDINGS,
    ) -> None:
        self.model, self.settings, self.cache = model, settings, cache
        self.picture = image if isinstance(image, SliceSource) else SliceSource(image)
        self.region = Region(ssl_region, self.picture.shape) if isinstance(ssl_region, np.ndarray) else ssl_region
        self.shape = (self.picture.shape[0], self.picture.shape[1])
        self.scale = min(model.scale(self.shape))
        self.margin = settings.box_margin / self.scale
        self.pace: dict[str, float] = {}
        self._answers: deque[Propagation] = deque(maxlen=REMEMBERED)
        self._order: dict[Click, None] = {}
        self._boxed: dict[tuple[tuple[int, int], ...], int] = {}  # where a box alone was drawn first
        self._steps: dict[tuple[object, ...], np.ndarray] = {}
        self._automatic: dict[int, np.ndarray | None] = {}
        self._lock = threading.Lock()
        model.sam.eval()

    def answer(self, prompt: ClientPrompt) -> np.ndarray:
        """The whole object, however long it takes.

        Args:
            prompt: Clicks and box in voxels of the image.

        Returns:
            uint8 (i, j, k), 0 or 1; without foreground click or box the automatic mask, or nothing.
        """
        return self.draw(prompt).volume()

    def draw(self, prompt: ClientPrompt, hurry: bool = False, least: float = 0.0) -> Propagation:
        """The object, or in a hurry as much of it as is drawn in time; its ``advance`` goes on.

        Slices with clicks are drawn from these (and the box), whatever time it takes; with a box alone, its middle
        slice. From there the mask of one slice prompts the next, until SAM does not believe in it, it vanishes, jumps,
        grows too much or looks different, the box ends, it meets what grows from the next clicked slice, or where it is
        what it was before. Background clicks count on their own slice.

        Args:
            prompt: Clicks and box in voxels of the image.
            hurry: Growing ends after ``first_click_seconds``, or ``click_seconds`` where an earlier answer is built on.
            least: Seconds that it has in any case.
        """
        start = time.perf_counter()
        with self._lock:
            self._note(prompt)
            wanted = frozenset(clicks_of(prompt))
            current = next((a for a in self._answers if a.clicks == wanted and a.box == prompt.box), None)
            if current is None:
                earlier = [a for a in self._answers if a.clicks < wanted and a.box == prompt.box]
                current = Propagation(self, prompt, max(earlier, key=lambda a: len(a.clicks), default=None))
            else:
                self._answers.remove(current)
            for other in self._answers:
                other.stopped = True
            current.stopped = False
            self._answers.append(current)
        seconds = max(self.settings.click_seconds if current.earlier else self.settings.first_click_seconds, least)
        while not current.done and not (hurry and time.perf_counter() - start + current.next_takes() > seconds):
            current.advance()
        return current

    def on_slice(self, prompt: ClientPrompt) -> tuple[int, np.ndarray] | None:
        """The slice k that the prompt is about and the object there, (i, j) bool; None without prompt on any slice."""
        with self._lock:
            self._note(prompt)
        k = self.current(prompt)
        return None if k is None else (k, self.clicked(k, prompt).mask)

    def current(self, prompt: ClientPrompt) -> int | None:
        """The slice k that the prompt is about, None without prompt on any slice."""
        seeds = self.seeds(prompt)
        return prompt.slice if prompt.slice in seeds else next(iter(seeds[::-1]), None)

    def without_last(self, prompt: ClientPrompt, count: int) -> ClientPrompt:
        """A prompt without the clicks that came last, then without its box.

        Clicks that were sent together, as a client does that reconnects, count in the order foreground, background.
        """
        with self._lock:
            self._note(prompt)
            sent = clicks_of(prompt)
            order = [c for c in self._order if c in sent]
        drop = set(order[max(len(order) - count, 0) :])
        parts = [
            np.array([v for v in voxels.tolist() if (label, *v) not in drop], np.int64).reshape(-1, 3)
            for label, voxels in ((1, prompt.foreground), (0, prompt.background))
        ]
        box = prompt.box if count <= len(order) else None
        return replace(prompt, foreground=parts[0], background=parts[1], box=box)

    @property
    def bytes(self) -> int:
        """Memory held by the answers."""
        parts = {id(p): p.bytes for a in list(self._answers) for p in a.known().values() if p is not None}
        return sum(parts.values()) + sum(s.nbytes for s in list(self._steps.values()))

    def _note(self, prompt: ClientPrompt) -> None:
        """Remember in which order the clicks came, also those of slices that a client leaves out for a while."""
        self._order |= clicks_of(prompt)
        for click in list(self._order)[:-MOST_CLICKS]:
            del self._order[click]

    def seeds(self, prompt: ClientPrompt) -> list[int]:
        """Slices that are drawn from the prompt itself, in the order they were clicked."""
        slices = list(dict.fromkeys(prompt.foreground[:, 2].tolist()))
        if self.region is not None:
            slices += [
                k for k in dict.fromkeys(prompt.background[:, 2].tolist()) if k not in slices and self._hit(k, prompt)
            ]
        if not slices and prompt.box is not None:
            low, high = prompt.box[2]
            asked = prompt.slice
            slices = [asked if asked is not None and low <= asked <= high else (low + high) // 2]
            if prompt.box not in self._boxed:
                self._boxed = {prompt.box: slices[0]}
        elif prompt.box in self._boxed and self._boxed[prompt.box] not in slices:
            # the box was answered before the clicks, which correct that answer and do not take its place
            slices.insert(0, self._boxed[prompt.box])
        return slices

    def automatic(self, k: int) -> np.ndarray | None:
        """The automatic mask's probabilities (i, j), or None without one on this slice."""
        found = None if self.region is None else self.region.slice(k)
        return found if found is not None and (found >= 0.5).any() else None

    def automatic_mask(self, k: int) -> np.ndarray | None:
        """The automatic mask (i, j), bool, or None without one on this slice; every reply shows it on many slices."""
        if k not in self._automatic:
            found = self.automatic(k)
            self._automatic[k] = None if found is None else np.packbits(found >= 0.5)
        packed = self._automatic[k]
        size = self.shape[0] * self.shape[1]
        return None if packed is None else np.unpackbits(packed, count=size).view(bool).reshape(self.shape)

    def _hit(self, k: int, prompt: ClientPrompt) -> bool:
        found = self.automatic_mask(k)
        clicked = prompt.background[prompt.background[:, 2] == k]
        return found is not None and bool(found[clicked[:, 0], clicked[:, 1]].any())

    def clicked(self, k: int, prompt: ClientPrompt, begun: SliceMask | None = None) -> SliceMask:
        """A slice with clicks: these one after the other, from the mask that they repair where there is one.

        Args:
            k: Slice.
            prompt: All clicks and the box.
            begun: What had grown there before the first of these clicks; it takes the automatic mask's place.
        """
        points, labels = self.points(k, prompt)
        box = box_of(prompt)
        automatic = self.automatic(k) if begun is None else begun.shown
        kept = replaced = start = None
        if automatic is not None:
            components, _ = ndimage.label(automatic >= 0.5, EIGHT_NEIGHBOURS)
            hit = np.zeros(self.shape, bool)
            hit[tuple(points[:, ::-1].astype(int).T)] = True
            hit[box_slices(box, 0, self.shape)] |= box is not None
            replaced = components_containing(components, hit)
            kept = (components > 0) & ~replaced
            start = np.where(replaced, automatic, 0).astype(np.float32) if replaced.any() else None
        found = self._through(k, box, points, labels, start)
        if begun is not None and kept is not None and automatic is not None:
            # what had grown goes on growing; only what the automatic mask gave stays beside it
            given = kept & begun.kept if begun.kept is not None else np.zeros_like(kept)
            found = np.maximum(found, np.where(kept & ~given, automatic, 0))
            kept = given if given.any() else None
            replaced = begun.replaced if begun.replaced is None or replaced is None else replaced | begun.replaced
        return SliceMask.of(found, self.margin, kept, replaced)

    def _through(
        self,
        k: int,
        box: tuple[float, float, float, float] | None,
        points: np.ndarray,
        labels: np.ndarray,
        start: np.ndarray | None,
    ) -> np.ndarray:
        """Clicks one after the other, each with those before it and the answer to them as mask (SAM-Med2D, section 3).

        Every answer obeys them (:func:`aslseg.prompts.corrections.enforce_clicks`); the next pass starts from it. The
        answer itself prompts a last pass where that has something new to see: the object of clicks alone, once it turns
        out to be small, from near; and a large one in a box that little else is known of. SAMs that know the ellipse in
        a box are then asked without it as well: the mean of the three answers is better than each (docs/results.md).

        Args:
            k: Slice.
            box: A human's, or None; nothing is drawn outside of it.
            points: (x, y) in the order of the clicks, (n, 2).
            labels: 1 in, 0 out, (n,).
            start: Probabilities (i, j) of the mask that is repaired, automatic or grown, or None.

        Returns:
            Probabilities (i, j).
        """
        if start is None and box is None and not (labels == 1).any():
            return np.zeros(self.shape, np.float32)
        if start is None and (labels == 1).any():  # SAM has to know what is meant
            first = int(np.flatnonzero(labels == 1)[0])
            turn = np.r_[first, np.delete(np.arange(len(labels)), first)]
            points, labels = points[turn], labels[turn]
        rounds = [n for n in range(1, len(labels)) if _lasting(n)] + [len(labels)]
        if start is None and len(labels) and not labels[0]:
            rounds.insert(0, 0)
        begun = b"" if start is None else np.packbits(start >= 0.5).tobytes()
        found = self._step(k, SlicePrompt(box, points[: rounds[0]], labels[: rounds[0]], start), begun)
        for n in rounds[1:]:
            found = self._step(k, SlicePrompt(box, points[:n], labels[:n], found), begun)
        last = SlicePrompt(box, points, labels, found)
        large = len(self.views([last])) == 1
        if box is None:
            return found if large else self._drawn(k, last, box, repairing=start is not None)
        if not large or start is not None or len(rounds) > 1:
            return found
        again = self._drawn(k, last, box)
        if not self.model.architecture.box_mask:
            return again
        plain = self._drawn(k, replace(last, mask=None), box, ellipse=False)
        return remove_stray_components(np.mean([found, again, plain], 0), points, labels)

    def _step(self, k: int, prompt: SlicePrompt, begun: object) -> np.ndarray:
        """The answer to some of the clicks, remembered where the next need it; ``begun`` names what is repaired."""
        key = (k, prompt.box, prompt.points.tobytes(), prompt.point_labels.tobytes(), begun)
        found = self._steps.get(key)
        if found is None:
            found = self._drawn(k, prompt, prompt.box, repairing=bool(begun))
            if _lasting(len(prompt.points)):
                self._steps[key] = found
            while len(self._steps) > STEPS:
                self._steps.pop(next(iter(self._steps)), None)
        return found

    def _drawn(
        self,
        k: int,
        prompt: SlicePrompt,
        box: tuple[float, float, float, float] | None,
        ellipse: bool = True,
        repairing: bool = False,
    ) -> np.ndarray:
        """SAM's probabilities (i, j), nothing outside a human's box, with all clicks obeyed and without strays.

        What a repaired mask has is not a stray, so nothing is taken away there.
        """
        asked, clicks = self.ask(k, [prompt], ellipse)[0][0], (prompt.points, prompt.point_labels)
        found = self.within(asked, box, margin=0)
        found = self.within(enforce_clicks(found, *clicks), box, margin=0)
        return found if repairing else remove_stray_components(found, *clicks)

    @torch.inference_mode()
    def ask(self, k: int, told: list[SlicePrompt], ellipse: bool = True) -> list[tuple[np.ndarray, float]]:
        """SAM's probabilities (i, j) for each prompt on slice k, and the IoU that it predicts.

        ``ellipse`` as :func:`aslseg.sam.predictor.predict.answer` has it.
        """
        answers: list[list[tuple[Crop, np.ndarray, float]]] = [[] for _ in told]
        for view, members in self.views(told).items():
            start = clock()
            embedding = self.embed([k], view)
            self.took("encode", clock() - start)
            seen = [view.seen(told[n]) for n in members]
            logits, _, iou = answer(self.model, embedding, seen, view.shape, ("box", "point", "mask"), ellipse)
            for n, probability, belief in zip(members, torch.sigmoid(logits).cpu().numpy(), iou.tolist(), strict=True):
                answers[n].append((view, probability, belief))
        return [merge_crops(a, self.shape) for a in answers]

    def views(self, told: list[SlicePrompt]) -> dict[Crop, list[int]]:
        """What SAM looks at for these prompts: numbers of prompts by part of the slice."""
        return crops_for(told, self.shape, self.model, self.settings.sam_zoom)

    def embed(self, slices: list[int], view: Crop | None = None) -> torch.Tensor:
        """Embeddings of some slices, or of a part of them."""
        view = view or self.picture.whole
        names = [self.picture.name(k, self.model, view) for k in slices]
        return self.cache.obtain(self.model, names, lambda n: self.picture.slice(slices[n])[view.index])

    def embedded(self, k: int) -> bool:
        """Whether a slice's embedding is at hand."""
        return self.cache.has(self.picture.name(k, self.model))

    def took(self, what: str, seconds: float) -> None:
        """Remember how long encoding takes; what was at hand does not count."""
        if seconds > 0.005:
            self.pace[what] = 0.5 * (self.pace.get(what, seconds) + seconds)

    def points(self, k: int, prompt: ClientPrompt) -> tuple[np.ndarray, np.ndarray]:
        """Clicks on slice k in their order, as (x, y) points (n, 2), and their labels (n,)."""
        parts = [clicks[clicks[:, 2] == k, :2][-MOST_POINTS:] for clicks in (prompt.foreground, prompt.background)]
        labels = np.concatenate([np.full(len(part), label) for part, label in zip(parts, (1, 0), strict=True)])
        voxels = np.concatenate(parts)
        number = {click: n for n, click in enumerate(self._order)}
        clicks = zip(labels.tolist(), voxels.tolist(), strict=True)
        order = np.argsort([number.get((label, *v, k), len(number)) for label, v in clicks], kind="stable")
        return to_xy(voxels[order.astype(int)]), labels[order.astype(int)]

    def within(
        self,
        probability: np.ndarray,
        box: tuple[float, float, float, float] | None,
        margin: float = LEAK_MARGIN,
    ) -> np.ndarray:
        """Probabilities (i, j), zero farther outside a box than ``margin`` pixels of SAM's input."""
        where = box_slices(box, margin / self.scale, self.shape)
        out = np.zeros_like(probability)
        out[where] = probability[where]
        return out


def _lasting(n: int) -> bool:
    """Whether the answer to the first ``n`` clicks is the mask prompt of the next ones."""
    return n <= SINGLY or n % SINGLY == 0
