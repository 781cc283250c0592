"""A SAM that segments stitched canvases without prompts, as CFR fine-tunes it (arXiv 2403.11229, docs/science.md §2.2).

Its decoder has a mask token for the background and one for each label, which compete in a softmax. One encoder pass
segments as many slices as a canvas holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.losses import segmentation_loss
from aslseg.compute.schedules import polynomial
from aslseg.compute.weights import save_weights
from aslseg.errors import BadWeightsError, NotEnoughCasesError
from aslseg.files import sha256
from aslseg.sam.cfr.stitch import IGNORED, Layout, monotone_map
from aslseg.sam.modeling.architecture import build
from aslseg.sam.modeling.build import SAMModel, load_any
from aslseg.sam.modeling.lora import merge_lora
from aslseg.sam.training.finetune import file_metadata, run_steps, summary, trainable, update
from aslseg.settings import Settings
from aslseg.types import ProgressCallback, no_progress

logger = logging.getLogger(__name__)

BATCH = 2
MAPPED_FRACTION = 0.5  # of the slices get another contrast
FOREGROUND_FRACTION = 0.5  # of the canvases are drawn around a slice with foreground
WEIGHT_DECAY = 0.1
NEW = ("mask_decoder.mask_tokens.", "mask_decoder.output_hypernetworks_mlps.", "mask_decoder.iou_prediction_head.")


def canvas_size(model: SAMModel, shape: tuple[int, ...], settings: Settings) -> int:
    """Edge of the canvases for volumes of ``shape`` (i, j, k)."""
    return settings.sam_canvas or max(model.image_size, *shape[:2])


def forward(model: SAMModel, canvases: Tensor) -> Tensor:
    """Logits (n, 1 + N, S, S), background first, for canvases (n, S, S) of grey values as :func:`_grey` scales them."""
    sam = model.sam
    embeddings = model.encode(canvases)
    count = len(embeddings)
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    low, _ = sam.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse.expand(count, -1, -1),
        dense_prompt_embeddings=dense + embeddings,
    )
    return model.to_slices(low.float(), (canvases.shape[1], canvases.shape[2]))


@torch.inference_mode()
def predict(model: SAMModel, image: np.ndarray, settings: Settings) -> np.ndarray:
    """Class probabilities of a volume, with one pass of the encoder for each canvas.

    Args:
        model: From :func:`load`.
        image: (i, j, k) float32 in 0..1.
        settings: ``sam_canvas``.

    Returns:
        (1 + N, i, j, k) float32, background first.

    Raises:
        BadSettingsError: A slice is larger than ``sam_canvas``.
    """
    model.sam.eval()
    layout = Layout.of((image.shape[0], image.shape[1], image.shape[2]), canvas_size(model, image.shape, settings))
    canvases = layout.stitch(_grey(model, image), 0)
    answers = []
    for canvas in canvases:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
            logits = forward(model, torch.from_numpy(canvas)[None])
        answers.append(logits.float().softmax(1)[0].cpu().numpy())
    return layout.cut(np.stack(answers))


def load(path: Path, settings: Settings) -> SAMModel:
    """Load a SAM for canvases.

    Args:
        path: A file of :func:`train`, or CFR's with the setting ``sam_base``.
        settings: Labels.

    Raises:
        BadWeightsError: The file holds a promptable SAM or one for other labels, or it cannot be used.
    """
    model, names = load_any(path, settings), list(settings.label_set.names)
    if not model.architecture.canvas:
        raise BadWeightsError(f"{path.name}: takes prompts, expected a SAM for canvases; train one with recipe cfr")
    trained = model.metadata.get("labels", names)
    if trained != names or model.architecture.masks != len(names):
        raise BadWeightsError(
            f"{path.name}: segments {model.architecture.masks} labels ({', '.join(trained)}), settings name "
            f"{len(names)} ({', '.join(names)}); set labels as they were, or train it anew"
        )
    return model


def for_canvases(model: SAMModel, labels: int, seed: int) -> SAMModel:
    """A SAM with new mask tokens for the background and the labels; the other weights are kept."""
    architecture = replace(model.architecture, masks=labels, canvas=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build(architecture)
    state = {k: v for k, v in model.sam.state_dict().items() if not k.startswith(NEW)}
    sam.load_state_dict(sam.state_dict() | state)
    return SAMModel(sam, architecture, model.metadata, model.device)


def train(
    labelled: Sequence[Prepared], settings: Settings, out: Path, *, init: Path, report: ProgressCallback = no_progress
) -> dict[str, Any]:
    """Fine-tune SAM on stitched slices without prompts: half cross-entropy, half Dice over the pixels of slices.

    As in CFR, a step takes two canvases, half of the slices get a random contrast, canvases are rotated and mirrored,
    and AdamW has a weight decay of 0.1 and a polynomial schedule; CFR trains with ``sam_train = lora``. Grey values are
    scaled by the conventions of the file that training starts from.

    Args:
        labelled: Human-labelled cases on the working grid; cases without a label are left out.
        settings: ``sam_train``, ``sam_lora_rank``, ``sam_canvas``, ``sam_iterations``, ``sam_learning_rate``, ``seed``,
            labels.
        out: Model file to write (``*.safetensors``, kind ``sam``), LoRA merged.
        init: SAM file to start from.
        report: Called with (step, iterations, loss=..., dice=...).

    Returns:
        ``loss`` and ``dice`` (of the foreground, means of the last fifth of the steps), ``first_loss``, ``steps``,
        ``seconds``, ``parameters`` (trained values), ``sha256``.

    Raises:
        NotEnoughCasesError: No label holds any foreground.
        TrainingDivergedError: The loss became NaN or infinite.
        BadSettingsError: Slices are larger than ``sam_canvas``, or an odd token grid is to get adapters.
        BadWeightsError: As :func:`aslseg.sam.modeling.build.load_any`.
    """
    started = time.monotonic()
    model, names = load_any(init, settings), list(settings.label_set.names)
    masks = model.architecture.masks
    if not model.architecture.canvas or model.metadata.get("labels", names) != names or masks != len(names):
        if model.architecture.canvas:
            logger.warning("%s segments other labels; the tokens of its labels are learned anew", init.name)
        model = for_canvases(model, len(names), settings.seed)
    cases = [c for c in labelled if c.label is not None and np.asarray(c.label).any()]
    if not cases:
        raise NotEnoughCasesError(
            f"none of the {len(labelled)} labels holds {' or '.join(settings.label_set.names)}; SAM needs at least one "
            "labelled slice. Draw a label and submit it"
        )
    tuner = _Tuner(model, cases, settings)
    shown = run_steps(tuner.step, settings, report)
    if settings.sam_train == "lora":
        merge_lora(model.sam.image_encoder)
    save_weights(out, model.sam.state_dict(), file_metadata(model, settings, init))
    seconds, parameters = time.monotonic() - started, sum(p.numel() for p in tuner.trained)
    return {**summary(shown), "seconds": seconds, "parameters": parameters, "sha256": sha256(out)}


class _Tuner:
    """Model, optimiser and one training step that depends on nothing but seed and step number."""

    def __init__(self, model: SAMModel, cases: Sequence[Prepared], settings: Settings) -> None:
        self.model, self.cases, self.settings = model, cases, settings
        self.trained = trainable(model, settings)
        self.optimiser = torch.optim.AdamW(self.trained, settings.sam_learning_rate, weight_decay=WEIGHT_DECAY)

    def step(self, number: int) -> tuple[float, float]:
        """One optimiser step: loss and Dice of the foreground."""
        s = self.settings
        rng = np.random.default_rng([s.seed, number])
        self.model.sam.train()
        losses, dices = [], []
        for case in (self.cases[n] for n in rng.integers(len(self.cases), size=BATCH)):
            canvas, target = (torch.from_numpy(a)[None].to(self.model.device) for a in self._canvas(case, rng))
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.model.bf16):
                logits = forward(self.model, canvas)
            known = target != IGNORED
            truth = (target * known).long()
            losses.append(segmentation_loss(logits[..., None], truth[..., None], known.float()[..., None]))
            got, true = (logits.argmax(1) > 0) & known, truth > 0
            dices.append(float((2 * (got & true).sum() + 1) / (got.sum() + true.sum() + 1)))
        loss = torch.stack(losses).mean()
        update(loss, self.trained, self.optimiser, s.sam_learning_rate * polynomial(number / s.sam_iterations), number)
        return loss.item(), float(np.mean(dices))

    def _canvas(self, case: Prepared, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Grey values float32 and labels uint8 (S, S) of neighbouring slices that fill one canvas."""
        i, j, k = case.image.shape
        size = canvas_size(self.model, case.image.shape, self.settings)
        whole = Layout.of((i, j, k), size)
        depth = min(k, whole.rows * whole.columns)
        start = int(rng.integers(k - depth + 1))
        if rng.random() < FOREGROUND_FRACTION:
            found = np.flatnonzero(np.asarray(case.label).any((0, 1)))
            start = int(np.clip(rng.choice(found) - rng.integers(depth), 0, k - depth))
        image = np.array(case.image[..., start : start + depth], np.float32)
        for n in np.flatnonzero(rng.random(depth) < MAPPED_FRACTION):
            image[..., n] = monotone_map(image[..., n], rng)
        layout = Layout.of((i, j, depth), size)
        canvas = layout.stitch(_grey(self.model, image), 0)[0]
        label = layout.stitch(np.asarray(case.label)[..., start : start + depth].astype(np.uint8), IGNORED)[0]
        turns, mirror = int(rng.integers(4)), int(rng.choice([-1, 1]))
        return tuple(np.ascontiguousarray(np.rot90(a, turns)[:, ::mirror]) for a in (canvas, label))  # type: ignore[return-value]


def _grey(model: SAMModel, image: np.ndarray) -> np.ndarray:
    """Grey values of a volume, scaled by the conventions of the model."""
    if model.conventions.scaling == "zscore":
        return (image - image.mean()) / max(float(image.std()), 1e-6)
    return image
