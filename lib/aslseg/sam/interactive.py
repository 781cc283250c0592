"""An annotator's clicks to a whole object: the clicked slices first, then slice by slice away from them.

Clients send all their clicks with every request, so an answer is computed from them alone; only image embeddings are
remembered. The same clicks give the same mask whatever was clicked before, and no annotator's clicks can reach
another's mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from scipy import ndimage

from aslseg.prompts.frame import SlicePrompt, box_slices, to_box, to_xy
from aslseg.prompts.from_client import ClientPrompt
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS, slice_prompts
from aslseg.sam.build import SAMModel
from aslseg.sam.embeddings import EmbeddingCache, content_hash
from aslseg.sam.predict import LEAK_MARGIN, answer
from aslseg.settings import Settings

EMBEDDINGS = EmbeddingCache()  # shared by all annotators: it holds images, not answers
LEAST_IOU = 0.5  # predicted by SAM; below it a slice is taken to lie beyond the object
LEAST_OVERLAP = 0.3  # Dice with the slice before
MOST_GROWTH = 2.0  # area from one slice to the next
MOST_CHANGE = 2.0  # of the median intensity, in standard deviations within the clicked slices' object
MOST_POINTS = 64  # on one slice; the last ones count
AHEAD = 4  # slices encoded together when growing


class Clicks:
    """Answers one annotator's clicks on one object of one image.

    Args:
        model: SAM.
        image: (i, j, k) float32 in 0..1.
        settings: ``box_margin`` and ``min_component``.
        ssl_region: (i, j, k) float32 probability of the object from the SSL model, or None. Where it is there, it is
            the mask prompt on clicked slices, so that a wrong automatic mask is repaired and not redrawn.
        cache: Embeddings; by default those shared by all.
    """

    def __init__(
        self,
        model: SAMModel,
        image: np.ndarray,
        settings: Settings,
        ssl_region: np.ndarray | None = None,
        cache: EmbeddingCache = EMBEDDINGS,
    ) -> None:
        self.model, self.image, self.settings, self.ssl_region, self.cache = (
            model,
            image,
            settings,
            ssl_region,
            cache,
        )
        self.shape = (image.shape[0], image.shape[1])
        self.scale = min(model.scale(self.shape))
        self._key = (content_hash(image), model.fingerprint)
        self._lock = threading.Lock()

    @torch.inference_mode()
    def answer(self, prompt: ClientPrompt) -> np.ndarray:
        """The object in 3-D.

        Slices with foreground clicks are drawn from these (and the box); with a box alone, its middle slice. From
        there the mask of one slice prompts the next, until SAM does not believe in it, it vanishes, jumps, grows too
        much or looks different, the box ends, or the half-way to the next clicked slice is reached. Background
        clicks count on their own slice.

        Args:
            prompt: Clicks and box in voxels of ``image``.

        Returns:
            uint8 (i, j, k), 0 or 1; empty without a foreground click or box.
        """
        with self._lock:
            self.model.sam.eval()
            drawn = {k: self._clicked(k, prompt) for k in self._clicked_slices(prompt)}
            look = self._look(drawn)
            for start, step, last in list(_journeys(sorted(drawn), self._extent(prompt))):
                before = drawn[start]
                for k in range(start + step, last + step, step):
                    after = self._grown(k, step, last, before, prompt)
                    if after is None or not self._alike(k, after, look):
                        break
                    drawn[k] = before = after
            out = np.zeros(self.image.shape, np.uint8)
            for k, probability in drawn.items():
                out[..., k] = probability >= 0.5
        return out

    def _clicked_slices(self, prompt: ClientPrompt) -> list[int]:
        slices = list(dict.fromkeys(prompt.foreground[:, 2].tolist()))
        if not slices and prompt.box is not None:
            low, high = prompt.box[2]
            asked = prompt.slice
            slices = [asked if asked is not None and low <= asked <= high else (low + high) // 2]
        return slices

    def _extent(self, prompt: ClientPrompt) -> tuple[int, int]:
        """First and last slice that the object may reach."""
        return prompt.box[2] if prompt.box is not None else (0, self.image.shape[2] - 1)

    def _clicked(self, k: int, prompt: ClientPrompt) -> np.ndarray:
        """Probability (i, j) on a slice with clicks: the first click or the box, then all with that answer as mask."""
        points, labels = self._points(k, prompt)
        box = _box(prompt)
        mask = None
        if self.ssl_region is not None and (self.ssl_region[..., k] >= 0.5).any():
            mask = np.asarray(self.ssl_region[..., k], np.float32)
        first = np.flatnonzero(labels == 1)[:1]
        probability, _ = self._ask(k, SlicePrompt(box, points[first], labels[first], mask))
        if len(points) > len(first):
            probability, _ = self._ask(k, SlicePrompt(box, points, labels, probability))
        return self._within(probability, box)

    def _grown(self, k: int, step: int, last: int, before: np.ndarray, prompt: ClientPrompt) -> np.ndarray | None:
        """Probability (i, j) on the slice next to one with ``before``; None where the object ends."""
        if not self.cache.has(self._key, k):
            ahead = range(k, k + step * min(AHEAD, abs(last - k) + 1), step)
            self.cache.get(self.model, self.image, list(ahead), self._key)
        points, labels = self._points(k, prompt)
        out = np.zeros(self.shape, np.float32)
        for part in slice_prompts(before >= 0.5, before, self.settings, self.scale):
            told = SlicePrompt(
                part.box,
                np.concatenate([part.points, points]),
                np.concatenate([part.point_labels, labels]),
                part.mask,
            )
            probability, iou = self._ask(k, told)
            if iou >= LEAST_IOU and _follows(probability >= 0.5, before >= 0.5):
                out = np.maximum(out, self._within(probability, part.box))
        out = self._within(out, _box(prompt), margin=0)
        area = (out >= 0.5).sum()
        if area * self.scale**2 < self.settings.min_component or area > MOST_GROWTH * (before >= 0.5).sum():
            return None
        return out

    def _look(self, drawn: dict[int, np.ndarray]) -> tuple[float, float]:
        """Median and standard deviation of the intensities within the object on the clicked slices."""
        values = [self.image[..., k][probability >= 0.5] for k, probability in drawn.items()]
        inside = np.concatenate(values) if values else np.zeros(0)
        return (float(np.median(inside)), float(inside.std())) if inside.size else (0.0, 0.0)

    def _alike(self, k: int, probability: np.ndarray, look: tuple[float, float]) -> bool:
        """Whether the mask on slice k still shows the same tissue: beyond its end SAM tends to copy the mask prompt."""
        median = float(np.median(self.image[..., k][probability >= 0.5]))
        return abs(median - look[0]) <= MOST_CHANGE * max(look[1], 0.02)

    def _ask(self, k: int, told: SlicePrompt) -> tuple[np.ndarray, float]:
        """SAM's probability (i, j) for one prompt on slice k, and the IoU that it predicts."""
        embedding = self.cache.get(self.model, self.image, [k], self._key)
        logits, _, iou = answer(self.model, embedding, [told], self.shape, "box+point+mask")
        return torch.sigmoid(logits[0]).cpu().numpy(), float(iou[0])

    def _points(self, k: int, prompt: ClientPrompt) -> tuple[np.ndarray, np.ndarray]:
        """Clicks on slice k as (x, y) points (n, 2) and their labels (n,)."""
        parts = [clicks[clicks[:, 2] == k, :2][-MOST_POINTS:] for clicks in (prompt.foreground, prompt.background)]
        labels = np.concatenate([np.full(len(part), label) for part, label in zip(parts, (1, 0), strict=True)])
        return to_xy(np.concatenate(parts)), labels

    def _within(
        self,
        probability: np.ndarray,
        box: tuple[float, float, float, float] | None,
        margin: float = LEAK_MARGIN,
    ) -> np.ndarray:
        where = box_slices(box, margin / self.scale, self.shape)
        out = np.zeros_like(probability)
        out[where] = probability[where]
        return out


def _box(prompt: ClientPrompt) -> tuple[float, float, float, float] | None:
    if prompt.box is None:
        return None
    (i0, i1), (j0, j1), _ = prompt.box
    return to_box((i0, i1 + 1), (j0, j1 + 1))


def _follows(mask: np.ndarray, before: np.ndarray) -> bool:
    """Whether a component's mask (i, j) overlaps enough with what it grew from."""
    components, _ = ndimage.label(before, EIGHT_NEIGHBOURS)
    origin = np.isin(components, np.unique(components[mask & before]))
    total = mask.sum() + origin.sum()
    return bool(total) and 2 * (mask & origin).sum() / total >= LEAST_OVERLAP


def _journeys(seeds: list[int], extent: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """(start, step, last slice) away from every clicked slice, neighbours meeting half-way."""
    for n, k in enumerate(seeds):
        up = (k + seeds[n + 1]) // 2 if n + 1 < len(seeds) else max(extent[1], k)
        down = (k + seeds[n - 1]) // 2 + 1 if n else min(extent[0], k)
        yield k, 1, up
        yield k, -1, down
