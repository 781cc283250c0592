"""SAM redraws the masks of the SSL model, slice by slice and component by component (docs/science.md, section 1.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

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
    Where the SSL model found nothing there is no prompt, and the result is 0.

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
    slices = np.flatnonzero((ssl_regions >= 0.5).any((0, 1, 2))).tolist()
    for batch in _batches(settings.sam_batch, slices):
        components = [
            _Component(k, region, prompt)
            for k in batch
            for region, probability in enumerate(ssl_regions[..., k])
            for prompt in slice_prompts(probability >= 0.5, probability, settings, scale)
        ]
        answers = _answers(model, image, components, settings)
        for component, probability in zip(components, answers, strict=True):
            target = out[component.region, :, :, component.k]
            np.maximum(target, probability, out=target)
    return out


@dataclass(frozen=True)
class _Component:
    """The prompt for one component of a region on slice k."""

    k: int
    region: int
    prompt: SlicePrompt


def _answers(
    model: SAMModel, image: np.ndarray, components: Sequence[_Component], settings: Settings
) -> Iterator[np.ndarray]:
    """Probabilities (i, j) for each component. Crops of one shape are encoded, and asked about, together.

    There may be hundreds of components, so only the pixels near the box of each are kept in memory meanwhile.
    """
    shape = (image.shape[0], image.shape[1])
    margin = LEAK_MARGIN / min(model.scale(shape))
    by_shape: dict[tuple[int, int], list[tuple[Crop, int]]] = {}
    for crop, numbers in crops_for([c.prompt for c in components], shape, model, settings.sam_zoom).items():
        by_shape.setdefault(crop.shape, []).extend((crop, n) for n in numbers)
    answers: list[list[tuple[Crop, np.ndarray, float]]] = [[] for _ in components]
    for questions in by_shape.values():
        encoded = list(dict.fromkeys((components[n].k, crop) for crop, n in questions))
        stacks = (
            np.stack([image[(*crop.index, k)] for k, crop in batch], -1)
            for batch in _batches(settings.sam_batch, encoded)
        )
        embeddings = torch.cat([encode_slices(model, stack) for stack in stacks])
        for batch in _batches(PROMPTS_PER_DECODER_PASS, questions):
            chosen = embeddings[[encoded.index((components[n].k, crop)) for crop, n in batch]]
            local = [crop.to_crop(components[n].prompt) for crop, n in batch]
            logits, _, iou = predict_masks(model, chosen, local, batch[0][0].shape, settings.sam_prompts)
            drawn = torch.sigmoid(logits).cpu().numpy()
            for (crop, n), probability, score in zip(batch, drawn, iou.tolist(), strict=True):
                near = crop.intersect(*box_slices(components[n].prompt.box, margin, shape))
                answers[n].append((near, probability[near.index_in(crop)].copy(), score))
    return (merge_crops(found, shape)[0] for found in answers)


def _batches(size: int, items: list[T]) -> Iterator[list[T]]:
    return (items[at : at + size] for at in range(0, len(items), size))
