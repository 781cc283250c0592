"""SAM redraws the masks of the SSL model, slice by slice and component by component (docs/science.md, section 1.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from aslseg.cases.relative import centres, outermost, relative
from aslseg.prompts.frame import SlicePrompt, box_slices
from aslseg.prompts.from_mask import slice_prompts
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.predictor.embeddings import encode_slices
from aslseg.sam.predictor.slice_predictor import LEAK_MARGIN, predict_masks
from aslseg.sam.predictor.zoom import Crop, crops_for, merge_crops
from aslseg.settings import Settings

PROMPTS_PER_DECODER_PASS = 32
T = TypeVar("T")


@torch.inference_mode()
def redraw(model: SAMModel, image: np.ndarray, ssl_regions: np.ndarray, settings: Settings) -> np.ndarray:
    """Probabilities of the regions as SAM draws them, prompted by those of the SSL model.

    An axial slice is encoded once, and only if some region is found on it; parts of it are encoded for small
    components. The components of all regions on a batch of slices share passes of the decoder. The answer to a
    component counts within its box plus 10 pixels of SAM's input; several components are joined by their maximum.
    Where the SSL model found nothing there is no prompt, and the result is 0. A SAM that was fine-tuned on relative
    intensities is shown nested labels in these (:mod:`aslseg.cases.relative`), around the parent of the SSL model.

    Args:
        model: SAM.
        image: (i, j, k) float32 in 0..1; axial slices are ``image[:, :, k]``.
        ssl_regions: (R, i, j, k) float32 region probabilities.
        settings: ``sam_prompts``, ``sam_zoom``, ``box_margin``, ``min_component``, ``sam_batch``.

    Returns:
        (R, i, j, k) float32 in 0..1.

    Raises:
        ValueError: Image and regions differ in shape.
    """
    if ssl_regions.shape[1:] != image.shape:
        raise ValueError(f"expected regions of shape (R, {image.shape}), got {ssl_regions.shape}")
    shape = (image.shape[0], image.shape[1])
    scale = min(model.scale(shape))
    out = np.zeros(ssl_regions.shape, np.float32)
    model.sam.eval()
    views = _views(model, image, ssl_regions, settings)
    slices = np.flatnonzero((ssl_regions >= 0.5).any((0, 1, 2))).tolist()
    for batch in _batches(settings.sam_batch, slices):
        components = [
            _Component(k, region, prompt, views[region])
            for k in batch
            for region, probability in enumerate(ssl_regions[..., k])
            for prompt in slice_prompts(probability >= 0.5, probability, settings, scale)
        ]
        answers = _answers(model, components, settings)
        for component, probability in zip(components, answers, strict=True):
            target = out[component.region, :, :, component.k]
            np.maximum(target, probability, out=target)
    return out


@dataclass(frozen=True)
class View:
    """A scan as SAM is shown it.

    Attributes:
        image: (i, j, k) in 0..1.
        centre, half_range: Of relative intensities; None: those of the scan.
    """

    image: np.ndarray
    centre: float | None = None
    half_range: float = 0.25

    def slice(self, rows: slice, columns: slice, k: int) -> np.ndarray:
        """Part of a slice."""
        pixels = self.image[rows, columns, k]
        return pixels if self.centre is None else relative(pixels, self.centre, self.half_range)


def _views(model: SAMModel, image: np.ndarray, ssl_regions: np.ndarray, settings: Settings) -> list[View]:
    """How SAM is shown each region; as the scan is where it knows no other view, or no parent is found."""
    half_range, labels = model.metadata.get("relative"), settings.label_set
    if half_range is None:
        return [View(image)] * len(labels)
    known = centres(image, [p >= 0.5 for p in ssl_regions], labels)
    around = [None if outer is None else known.get(outer) for outer in outermost(labels)]
    return [View(image, centre, half_range) for centre in around]


@dataclass(frozen=True)
class _Component:
    """The prompt for one component of a region on slice k, and how that is shown."""

    k: int
    region: int
    prompt: SlicePrompt
    view: View

    def place(self, crop: Crop) -> tuple[int, Crop, float | None]:
        """What is encoded for it."""
        return self.k, crop, self.view.centre


def _answers(model: SAMModel, components: Sequence[_Component], settings: Settings) -> Iterator[np.ndarray]:
    """Probabilities (i, j) for each component. Crops of one shape are encoded, and asked about, together.

    There may be hundreds of components, so only the pixels near the box of each are kept in memory meanwhile.
    """
    if not components:
        return iter(())
    rows, columns, _ = components[0].view.image.shape
    shape = (rows, columns)
    margin = LEAK_MARGIN / min(model.scale(shape))
    by_shape: dict[tuple[int, int], list[tuple[Crop, int]]] = {}
    for crop, numbers in crops_for([c.prompt for c in components], shape, model, settings.sam_zoom).items():
        by_shape.setdefault(crop.shape, []).extend((crop, n) for n in numbers)
    answers: list[list[tuple[Crop, np.ndarray, float]]] = [[] for _ in components]
    for questions in by_shape.values():
        shown = {components[n].place(crop): components[n].view for crop, n in questions}
        encoded = list(shown)
        stacks = (
            np.stack([shown[place].slice(*place[1].index, place[0]) for place in batch], -1)
            for batch in _batches(settings.sam_batch, encoded)
        )
        embeddings = torch.cat([encode_slices(model, stack) for stack in stacks])
        for batch in _batches(PROMPTS_PER_DECODER_PASS, questions):
            chosen = embeddings[[encoded.index(components[n].place(crop)) for crop, n in batch]]
            local = [crop.to_crop(components[n].prompt) for crop, n in batch]
            logits, _, iou = predict_masks(model, chosen, local, batch[0][0].shape, settings.sam_prompts)
            drawn = torch.sigmoid(logits).cpu().numpy()
            for (crop, n), probability, score in zip(batch, drawn, iou.tolist(), strict=True):
                near = crop.intersect(*box_slices(components[n].prompt.box, margin, shape))
                answers[n].append((near, probability[near.index_in(crop)].copy(), score))
    return (merge_crops(found, shape)[0] for found in answers)


def _batches(size: int, items: list[T]) -> Iterator[list[T]]:
    return (items[at : at + size] for at in range(0, len(items), size))
