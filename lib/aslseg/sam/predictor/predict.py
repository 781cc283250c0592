"""SAM redraws the SSL model's masks, slice by slice and component by component (science.md, section 1.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aslseg.prompts.frame import SlicePrompt, box_slices
from aslseg.prompts.from_mask import slice_prompts
from aslseg.sam.modeling.attention import use_fused_attention
from aslseg.sam.modeling.build import SAMModel, ellipses
from aslseg.sam.predictor.zoom import Crop, crops_for, merge_crops
from aslseg.settings import Settings

LEAK_MARGIN = 10  # pixels of SAM's input around a box beyond which nothing is kept
PROMPTS_AT_ONCE = 32
T = TypeVar("T")


@torch.inference_mode()
def redraw(model: SAMModel, image: np.ndarray, ssl_regions: np.ndarray, settings: Settings) -> np.ndarray:
    """Region probabilities as SAM draws them, prompted by the SSL model's.

    Every axial slice is encoded once and only if some region is found on it, and parts of it for small components; all
    components of all regions of a batch of slices share the decoder. A component's answer is kept within its box plus
    10 pixels of SAM's input; several components are joined by their maximum. Without a prompt there is no prediction:
    what SSL missed stays missed.

    Args:
        model: SAM.
        image: (i, j, k) float32 in 0..1; axial slices are ``image[:, :, k]``.
        ssl_regions: (R, i, j, k) float32 region probabilities.
        settings: ``sam_prompts``, ``sam_zoom``, ``box_margin``, ``min_component``, ``sam_batch``.

    Returns:
        (R, i, j, k) float32 in 0..1.

    Raises:
        ValueError: Shapes that do not belong together.
    """
    if ssl_regions.shape[1:] != image.shape:
        raise ValueError(f"expected regions of shape (R, {image.shape}), got {ssl_regions.shape}")
    shape = (image.shape[0], image.shape[1])
    scale = min(model.scale(shape))
    out = np.zeros(ssl_regions.shape, np.float32)
    model.sam.eval()
    slices = np.flatnonzero((ssl_regions >= 0.5).any((0, 1, 2))).tolist()
    for batch in _by(settings.sam_batch, slices):
        asked = [
            _Asked(k, region, prompt)
            for k in batch
            for region, probability in enumerate(ssl_regions[..., k])
            for prompt in slice_prompts(probability >= 0.5, probability, settings, scale)
        ]
        for a, probability in zip(asked, _answers(model, image, asked, settings), strict=True):
            target = out[a.region, :, :, a.k]
            np.maximum(target, probability, out=target)
    return out


@dataclass(frozen=True)
class _Asked:
    """A prompt for one component of a region on slice k."""

    k: int
    region: int
    prompt: SlicePrompt


def _answers(model: SAMModel, image: np.ndarray, asked: Sequence[_Asked], settings: Settings) -> Iterator[np.ndarray]:
    """Probabilities (i, j) for each prompt. What has the same shape is encoded, and asked for, together.

    Only what lies in the prompt's box and a little beyond is kept meanwhile: there may be hundreds of prompts.
    """
    shape = (image.shape[0], image.shape[1])
    reach = LEAK_MARGIN / min(model.scale(shape))
    looks: dict[tuple[int, int], list[tuple[Crop, int]]] = {}  # by shape: what is looked at for which prompt
    for view, members in crops_for([a.prompt for a in asked], shape, model, settings.sam_zoom).items():
        looks.setdefault(view.shape, []).extend((view, n) for n in members)
    answers: list[list[tuple[Crop, np.ndarray, float]]] = [[] for _ in asked]
    for alike in looks.values():
        shown = list(dict.fromkeys((asked[n].k, view) for view, n in alike))
        parts = [np.stack([image[(*view.index, k)] for k, view in some], -1) for some in _by(settings.sam_batch, shown)]
        embeddings = torch.cat([encode(model, part) for part in parts])
        for some in _by(PROMPTS_AT_ONCE, alike):
            chosen = embeddings[[shown.index((asked[n].k, view)) for view, n in some]]
            seen = [view.seen(asked[n].prompt) for view, n in some]
            logits, _, iou = answer(model, chosen, seen, some[0][0].shape, settings.sam_prompts)
            for (view, n), drawn, belief in zip(some, torch.sigmoid(logits).cpu().numpy(), iou.tolist(), strict=True):
                near = view.near(*box_slices(asked[n].prompt.box, reach, shape))
                answers[n].append((near, drawn[near.index_in(view)].copy(), belief))
    return (merge_crops(found, shape)[0] for found in answers)


def _by(count: int, things: list[T]) -> Iterator[list[T]]:
    return (things[at : at + count] for at in range(0, len(things), count))


def encode(model: SAMModel, slices: np.ndarray) -> Tensor:
    """Embeddings (n, C, grid, grid) float32 of the slices (i, j, n) of a volume in 0..1."""
    use_fused_attention(model.sam.image_encoder)
    stack = torch.from_numpy(np.ascontiguousarray(np.moveaxis(slices, -1, 0), np.float32))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
        return model.encode(stack).float()


def answer(
    model: SAMModel,
    embeddings: Tensor,
    prompts: Sequence[SlicePrompt],
    shape: tuple[int, int],
    use: Collection[str],
    ellipse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """One mask for each prompt.

    Args:
        model: SAM.
        embeddings: (P, C, grid, grid), the slice's embedding for each prompt, or (1, ...) for all.
        prompts: P prompts in slice pixels. A part that is used must be there for all or for none.
        shape: (i, j) of the slices.
        use: Parts to use: box, point, mask.
        ellipse: Whether boxes without masks bring their ellipse, to SAMs that know it.

    Returns:
        Logits on the slices (P, i, j), low-res logits (P, 4 grid, 4 grid), predicted IoU (P,).
    """
    x_scale, y_scale = model.scale(shape)
    two = np.array([x_scale, y_scale])
    points = boxes = masks = None
    if "point" in use and all(len(p.points) for p in prompts):
        points = _points(prompts, two, model.device)
    if "box" in use and all(p.box is not None for p in prompts):
        corners = np.array([p.box for p in prompts]) * np.tile(two, 2)
        boxes = torch.as_tensor(corners, dtype=torch.float32, device=model.device)
    if "mask" in use and all(p.mask is not None for p in prompts):
        stack = torch.from_numpy(np.stack([p.mask for p in prompts if p.mask is not None]))
        masks = model.mask_prompt(model.to_low_res(stack))
    elif boxes is not None and ellipse and model.architecture.box_mask:
        size = 4 * model.architecture.grid
        masks = model.mask_prompt(ellipses(boxes, size, model.image_size / size))
    # a lone point may mean a part or the whole: most SAMs then draw three masks and say which they believe in
    ambiguous = points is not None and points[0].shape[1] == 1 and boxes is None and masks is None
    low, iou = model.decode(embeddings, points, boxes, masks, multimask=model.architecture.use_multimask(ambiguous))
    best = torch.arange(len(iou)), iou.argmax(1)
    low, iou = low[best].float(), iou[best].float()
    return model.to_slices(low[:, None], shape)[:, 0], low, iou


def _points(prompts: Sequence[SlicePrompt], scale: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points of all prompts in the input frame, padded with label -1 to the longest list."""
    most = max(len(p.points) for p in prompts)
    coordinates = np.zeros((len(prompts), most, 2))
    labels = np.full((len(prompts), most), -1)
    for n, prompt in enumerate(prompts):
        coordinates[n, : len(prompt.points)] = prompt.points * scale
        labels[n, : len(prompt.points)] = prompt.point_labels
    return torch.as_tensor(coordinates, dtype=torch.float32, device=device), torch.as_tensor(labels, device=device)
