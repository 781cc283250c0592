"""SAM on the slices of one volume: set the volume once, ask about its slices many times."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from aslseg.compute.click_priority import computing_time
from aslseg.prompts.frame import SlicePrompt, box_slices
from aslseg.sam.modeling.build import SAMModel, ellipses
from aslseg.sam.predictor.embeddings import EmbeddingCache
from aslseg.sam.predictor.slices import SliceSource
from aslseg.sam.predictor.zoom import Crop, crops_for, merge_crops
from aslseg.settings import Settings

LEAK_MARGIN = 10  # pixels of SAM's input around a box beyond which nothing is kept
MIN_RECORDED_SECONDS = 0.005  # less means that the embedding was there already
ALL_PARTS = ("box", "point", "mask")


class SlicePredictor:
    """Answers prompts on the slices of one volume, each of which is encoded once. Safe between threads.

    It knows nothing about the history of clicks: equal prompts get equal answers.

    Args:
        model: SAM.
        volume: (i, j, k) float32 in 0..1, or the slices of a scan.
        settings: ``sam_zoom``, ``sam_batch`` and the settings of prompts; the defaults where None.
        cache: Embeddings that are shared with other predictors; None: a cache of its own.

    Attributes:
        shape: (i, j) of a slice.
        depth: Number of slices.
        scale: Pixels of SAM's input per pixel of a slice, the smaller one of both axes.
        timings: Moving averages of what :meth:`record` was given, in seconds.
    """

    def __init__(
        self,
        model: SAMModel,
        volume: np.ndarray | SliceSource,
        settings: Settings | None = None,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self.model, self.settings = model, settings or Settings()
        self.source = volume if isinstance(volume, SliceSource) else SliceSource(volume)
        self.cache = cache or EmbeddingCache()
        self.shape, self.depth = (self.source.shape[0], self.source.shape[1]), self.source.shape[2]
        self.scale = min(model.scale(self.shape))
        self.timings: dict[str, float] = {}
        model.sam.eval()

    @torch.inference_mode()
    def predict(self, k: int, prompts: Sequence[SlicePrompt], ellipse: bool = True) -> list[tuple[np.ndarray, float]]:
        """Answer each prompt on a slice. Small objects are also looked at enlarged (:mod:`aslseg.sam.predictor.zoom`).

        Args:
            k: The slice.
            prompts: In pixels of the slice. Parts (box, points, mask) must be there for all of them or for none.
            ellipse: As :func:`predict_masks`.

        Returns:
            For each prompt the probabilities (i, j) float32 and the IoU that SAM predicts.
        """
        answers: list[list[tuple[Crop, np.ndarray, float]]] = [[] for _ in prompts]
        for crop, numbers in self.crops(prompts).items():
            start = computing_time()
            embedding = self.embed([k], crop)
            self.record("encode", computing_time() - start)
            local = [crop.to_crop(prompts[n]) for n in numbers]
            logits, _, iou = predict_masks(self.model, embedding, local, crop.shape, ALL_PARTS, ellipse)
            for n, probability, score in zip(numbers, torch.sigmoid(logits).cpu().numpy(), iou.tolist(), strict=True):
                answers[n].append((crop, probability, score))
        return [merge_crops(found, self.shape) for found in answers]

    @torch.inference_mode()
    def candidates(self, k: int, point: np.ndarray, crop: Crop) -> list[tuple[np.ndarray, float]]:
        """All masks that SAM offers for a lone click inside an object: a part, the whole, something larger.

        Args:
            k: The slice.
            point: (x, y) in pixels of the slice.
            crop: The part of the slice that SAM is shown; it holds the click.

        Returns:
            For each mask the probabilities (i, j) float32, 0 outside the crop, and the IoU that SAM predicts.
        """
        start = computing_time()
        embedding = self.embed([k], crop)
        self.record("encode", computing_time() - start)
        prompt = crop.to_crop(SlicePrompt(None, point[None], np.ones(1, int)))
        points, _, _ = _decoder_prompts(self.model, [prompt], crop.shape, ("point",), ellipse=False)
        low, iou = self.model.decode(embedding, points, multimask=self.model.conventions.use_multimask(True))
        found = []
        for drawn, score in zip(torch.sigmoid(self.model.to_slices(low.float(), crop.shape))[0], iou[0], strict=True):
            whole = np.zeros(self.shape, np.float32)
            whole[crop.index] = drawn.cpu().numpy()
            found.append((whole, float(score)))
        return found

    def crops(self, prompts: Sequence[SlicePrompt]) -> dict[Crop, list[int]]:
        """The parts of a slice that SAM is shown for these prompts, each with the numbers of its prompts."""
        return crops_for(prompts, self.shape, self.model, self.settings.sam_zoom)

    def embed(self, slices: Sequence[int], crop: Crop | None = None) -> Tensor:
        """Embeddings (n, C, grid, grid) of some slices, or of one part of them; those not kept are encoded together."""
        crop = crop or self.source.full_crop
        names = [self.source.name(k, self.model, crop) for k in slices]
        return self.cache.embed(self.model, names, lambda n: self.source.slice(slices[n])[crop.index])

    def embed_ahead(self, k: int, step: int, last: int) -> None:
        """Encode slice k and those after it, up to ``last``, in one batch, where a batch is quicker than its slices.

        A CPU computes a batch no quicker; there only the slices that are asked about are encoded.
        """
        if self.model.device.type != "cpu" and not self.is_embedded(k):
            count = min(self.settings.sam_batch, abs(last - k) + 1)
            self.embed(list(range(k, k + step * count, step)))

    def is_embedded(self, k: int) -> bool:
        """Whether the embedding of a slice is in memory or on disk."""
        return self.cache.has(self.source.name(k, self.model))

    def record(self, name: str, seconds: float) -> None:
        """Add a duration to the moving average of that name; times below the cost of any encoding are left out."""
        if seconds > MIN_RECORDED_SECONDS:
            self.timings[name] = 0.5 * (self.timings.get(name, seconds) + seconds)

    def expected_seconds(self, k: int) -> float:
        """How long propagation to slice k probably takes, by the timings so far."""
        encode = 0.0 if self.is_embedded(k) else self.timings.get("encode", 0.0)
        return encode + self.timings.get("step", 0.0)

    def keep_in_box(
        self, probability: np.ndarray, box: tuple[float, float, float, float] | None, margin: float = LEAK_MARGIN
    ) -> np.ndarray:
        """Probabilities (i, j), set to 0 farther than ``margin`` pixels of SAM's input outside a box."""
        inside = box_slices(box, margin / self.scale, self.shape)
        out = np.zeros_like(probability)
        out[inside] = probability[inside]
        return out


def predict_masks(
    model: SAMModel,
    embeddings: Tensor,
    prompts: Sequence[SlicePrompt],
    shape: tuple[int, int],
    parts: Collection[str],
    ellipse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass of the decoder: the best mask for each prompt.

    Args:
        model: SAM.
        embeddings: (P, C, grid, grid), the embedding of the slice for each prompt, or (1, ...) for all.
        prompts: P prompts in slice pixels. A part that is used must be there for all or for none.
        shape: (i, j) of the slices.
        parts: Parts of the prompts to use: box, point, mask.
        ellipse: Whether boxes without masks are accompanied by their ellipse, for SAMs with ``box_mask``
            (:class:`aslseg.sam.modeling.conventions.Conventions`).

    Returns:
        Logits on the slices (P, i, j), low-res logits (P, 4 grid, 4 grid), predicted IoU (P,).
    """
    points, boxes, masks = _decoder_prompts(model, prompts, shape, parts, ellipse)
    # a lone point may mean a part or the whole
    ambiguous = points is not None and points[0].shape[1] == 1 and boxes is None and masks is None
    low, iou = model.decode(embeddings, points, boxes, masks, multimask=model.conventions.use_multimask(ambiguous))
    best = torch.arange(len(iou)), iou.argmax(1)
    low, iou = low[best].float(), iou[best].float()
    return model.to_slices(low[:, None], shape)[:, 0], low, iou


def _decoder_prompts(
    model: SAMModel, prompts: Sequence[SlicePrompt], shape: tuple[int, int], parts: Collection[str], ellipse: bool
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
    """Points, boxes and masks as :meth:`aslseg.sam.modeling.build.SAMModel.decode` takes them."""
    scale = np.array(model.scale(shape))
    points = boxes = masks = None
    if "point" in parts and all(len(p.points) for p in prompts):
        points = _pack_points(prompts, scale, model.device)
    if "box" in parts and all(p.box is not None for p in prompts):
        corners = np.array([p.box for p in prompts]) * np.tile(scale, 2)
        boxes = torch.as_tensor(corners, dtype=torch.float32, device=model.device)
    if "mask" in parts and all(p.mask is not None for p in prompts):
        stack = torch.from_numpy(np.stack([p.mask for p in prompts if p.mask is not None]))
        masks = model.mask_prompt(model.to_low_res(stack))
    elif boxes is not None and ellipse and model.conventions.box_mask:
        size = 4 * model.architecture.grid
        masks = model.mask_prompt(ellipses(boxes, size, model.image_size / size))
    return points, boxes, masks


def _pack_points(prompts: Sequence[SlicePrompt], scale: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points of all prompts in the input frame, padded with label -1 to the longest list."""
    longest = max(len(p.points) for p in prompts)
    coordinates = np.zeros((len(prompts), longest, 2))
    labels = np.full((len(prompts), longest), -1)
    for n, prompt in enumerate(prompts):
        coordinates[n, : len(prompt.points)] = prompt.points * scale
        labels[n, : len(prompt.points)] = prompt.point_labels
    return torch.as_tensor(coordinates, dtype=torch.float32, device=device), torch.as_tensor(labels, device=device)
