"""Training of the adaptation network on labelled scans with synthetic errors (ASLseg, stage III)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.losses import DiceLoss
from torch import Tensor, nn

from aslseg.adaptation.faults import Faults
from aslseg.adaptation.network import AdaptationNetwork, strides_for
from aslseg.adaptation.synthetic import soft_pair
from aslseg.cases.patches import fit_start
from aslseg.cases.prepare import automatic_patch
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.relative import centres, half_range, parents, views
from aslseg.compute.augment import centre, random_geometry, random_intensity, warp
from aslseg.compute.device import bfloat16_pays, choose_device
from aslseg.compute.hardware import resolved
from aslseg.compute.schedules import polynomial
from aslseg.compute.weights import save_weights
from aslseg.errors import NotEnoughCasesError, TrainingDivergedError
from aslseg.files import sha256
from aslseg.sam.modeling.build import SAMModel
from aslseg.settings import Settings
from aslseg.types import ProgressCallback, no_progress

BATCH = 2
PATCH_VOXELS = 64 * 64 * 32
REDRAWS_PER_CASE, MOST_REDRAWS = 3, 24
REDRAWN_FRACTION = 0.5
"""Share of the samples that use a mask that SAM has drawn."""
FOREGROUND_FRACTION = 0.65
"""Share of the patches that hold a foreground voxel near their middle."""
IMAGE_DROPOUT = 0.2
BAND, BAND_WEIGHT = 2, 0.5
KEPT_VOXELS = 4000


@dataclass(frozen=True)
class Redraw:
    """A faulty mask of a case and SAM's redrawing of it; (R, i, j, k) uint8, probability times 255."""

    ssl: np.ndarray
    sam: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One patch: images (V, i, j, k) in 0..1, true regions, SAM's and the SSL model's probabilities (R, i, j, k).

    The first image is the scan's, the others are relative to a parent (:mod:`aslseg.cases.relative`).
    """

    images: np.ndarray
    truth: np.ndarray
    sam: np.ndarray
    ssl: np.ndarray


def crop(array: np.ndarray, start: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """The last three axes from ``start`` (may be negative) on, zero outside the array; a copy."""
    shape = array.shape[-3:]
    inside = [slice(min(max(a, 0), n), min(max(a + p, 0), n)) for a, p, n in zip(start, patch, shape, strict=True)]
    pad = [(max(-a, 0), max(a + p - n, 0)) for a, p, n in zip(start, patch, shape, strict=True)]
    return np.pad(array[..., inside[0], inside[1], inside[2]], [(0, 0)] * (array.ndim - 3) + pad)


def redraw_bank(
    labelled: Sequence[Prepared],
    sam: SAMModel,
    settings: Settings,
    rng: np.random.Generator,
    report: ProgressCallback,
    faults: Faults,
) -> list[list[Redraw]]:
    """Let SAM redraw faulty masks of the cases before training, because SAM is slow; a list per case."""
    from aslseg.sam.predictor.redraw import redraw

    each = max(1, min(REDRAWS_PER_CASE, MOST_REDRAWS // len(labelled)))
    chosen = set(rng.permutation(len(labelled))[:MOST_REDRAWS].tolist())
    bank: list[list[Redraw]] = [[] for _ in labelled]
    total = each * len(chosen)
    for n in sorted(chosen):
        case = labelled[n]
        image = np.asarray(case.image, np.float32)
        for _ in range(each):
            ssl = faults(case, rng)
            bank[n].append(Redraw(_pack(ssl), _pack(redraw(sam, image, ssl, settings))))
            report(0, settings.adapter_iterations, redraws=sum(map(len, bank)), of=total)
    return bank


def _pack(probabilities: np.ndarray) -> np.ndarray:
    return np.rint(np.nan_to_num(probabilities) * 255).astype(np.uint8)


class Samples:
    """Draws training patches: half of them with new synthetic errors, half from the bank of SAM's redrawn masks.

    In the former, SAM's mask is the faulty mask of the SSL model, drawn slightly differently, because SAM is prompted
    with that mask and repeats its error.

    Args:
        labelled: Cases with a human label.
        settings: Labels.
        patch: Shape in voxels.
        bank: A list of redraws per case, or None.
        faults: Makes the synthetic errors.
    """

    def __init__(
        self,
        labelled: Sequence[Prepared],
        settings: Settings,
        patch: Sequence[int],
        bank: list[list[Redraw]] | None,
        faults: Faults | None = None,
    ) -> None:
        self.cases, self.labels, self.patch, self.bank = list(labelled), settings.label_set, patch, bank
        self.faults = faults or Faults(self.labels)
        rng = np.random.default_rng(settings.seed)
        self.foreground = [self._voxels(np.asarray(c.label), rng) for c in self.cases]
        self.half_range = half_range(settings)
        self.centres = [self._centres(c) if self.half_range else {} for c in self.cases]

    def _centres(self, case: Prepared) -> dict[int, float]:
        return centres(case.image, list(self.labels.regions(np.asarray(case.label))), self.labels)

    def _voxels(self, label: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Some voxels of each region that is present, so that patches show small regions as often as large ones."""
        found = [np.flatnonzero(region) for region in self.labels.regions(label)]
        return [rng.choice(v, min(v.size, KEPT_VOXELS), replace=False) for v in found if v.size]

    def draw(self, rng: np.random.Generator) -> Sample:
        """One random patch."""
        n = int(rng.integers(len(self.cases)))
        case = self.cases[n]
        start = self._start(n, rng)
        image = crop(np.asarray(case.image), start, self.patch).astype(np.float32)
        truth = self.labels.regions(crop(np.asarray(case.label), start, self.patch))
        if self.bank and self.bank[n] and rng.random() < REDRAWN_FRACTION:
            chosen = self.bank[n][int(rng.integers(len(self.bank[n])))]
            sam, ssl = (crop(a, start, self.patch).astype(np.float32) / 255 for a in (chosen.sam, chosen.ssl))
            return Sample(self._images(image, n), truth, sam, ssl)
        truth, sam, ssl = self._synthetic(image, truth, case.grid.spacing, rng)
        return Sample(self._images(image, n), truth, sam, ssl)

    def _images(self, image: np.ndarray, n: int) -> np.ndarray:
        return views(image, self.centres[n], self.labels, self.half_range)

    def _start(self, n: int, rng: np.random.Generator) -> np.ndarray:
        shape, patch = np.array(self.cases[n].image.shape), np.array(self.patch)
        if self.foreground[n] and rng.random() < FOREGROUND_FRACTION:
            voxels = self.foreground[n][int(rng.integers(len(self.foreground[n])))]
            voxel = np.array(np.unravel_index(voxels[int(rng.integers(len(voxels)))], shape))
            start = voxel - patch // 2 + rng.integers(-(patch // 4), patch // 4 + 1)
        else:
            start = rng.integers(0, np.maximum(shape - patch, 0) + 1)
        return fit_start(start, shape, patch)

    def _synthetic(
        self,
        image: np.ndarray,
        truth: np.ndarray,
        spacing: tuple[float, float, float],
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        faulty = self.faults.corrupt(truth, image, spacing, rng)
        difference = rng.uniform(0, 2.5) if rng.random() < 0.5 else 0.0
        pairs = [soft_pair(mask, spacing, rng, difference) for mask in faulty]
        ssl, sam = (np.stack(masks) for masks in zip(*pairs, strict=True))
        return truth, sam, ssl


def adaptation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Half BCE, half Dice, and half the BCE in a band around the true border (docs/science.md §1.2, L_III).

    The Dice term is summed over the batch, so that a patch without a region does not dominate it. The band holds the
    voxels within two voxels of the border.

    Args:
        logits: (B, R, i, j, k).
        truth: (B, R, i, j, k), 0 or 1.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    dice = DiceLoss(sigmoid=True, squared_pred=True, batch=True)(logits, truth)
    band = _dilate(truth) + _dilate(1 - truth) - 1
    return 0.5 * (entropy.mean() + dice) + BAND_WEIGHT * (entropy * band).sum() / band.sum().clamp_min(1)


def _dilate(masks: Tensor) -> Tensor:
    """Masks (B, R, i, j, k) grown by BAND voxels along every axis."""
    for axis in range(3):
        size, pad = [1, 1, 1], [0, 0, 0]
        size[axis], pad[axis] = 2 * BAND + 1, BAND
        masks = F.max_pool3d(masks, size, 1, pad)
    return masks


class Trainer:
    """One training run: batches by step number, network, optimiser.

    Args:
        samples: Draws the patches.
        settings: Learning rate, iterations, seed, device.
        strides: Strides of the network's levels.
    """

    def __init__(self, samples: Samples, settings: Settings, strides: Sequence[Sequence[int]]) -> None:
        self.samples, self.settings = samples, settings
        self.logs: dict[str, float] = {}
        self.device = choose_device(settings)
        self.bf16 = bfloat16_pays(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            images = 1 + (len(parents(settings.label_set)) if samples.half_range else 0)
            network = AdaptationNetwork(len(settings.label_set), strides, images)
        self.network = network.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        gates = [self.network.kappa]
        weights = [p for p in self.network.parameters() if p is not self.network.kappa]
        self.optimiser = torch.optim.AdamW(
            [{"params": weights, "weight_decay": 1e-4}, {"params": gates, "weight_decay": 0.0}],
            lr=settings.adapter_learning_rate,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, V + 2R, ...) and true regions (B, R, ...) of a step; depend on nothing but seed and step."""
        rng = np.random.default_rng([self.settings.seed, step])
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        drawn = [self.samples.draw(rng) for _ in range(BATCH)]
        stacked = [np.concatenate([d.images, d.truth, d.sam, d.ssl]).astype(np.float32) for d in drawn]
        everything = torch.from_numpy(np.stack(stacked)).to(self.device)
        everything = warp(everything, random_geometry(everything.shape, generator, device=everything.device))
        regions = len(self.settings.label_set)
        image, truth, given = everything.split([self.network.images, regions, 2 * regions], 1)
        image = centre(random_intensity(image, generator))
        shown = torch.rand(BATCH, 1, 1, 1, 1, generator=generator) >= IMAGE_DROPOUT
        return torch.cat([image * shown.to(self.device), given], 1), (truth >= 0.5).float()

    def step(self, step: int) -> None:
        """One optimiser step; its numbers are in ``logs``."""
        for group in self.optimiser.param_groups:
            fraction = step / self.settings.adapter_iterations
            group["lr"] = self.settings.adapter_learning_rate * polynomial(fraction) * min(1.0, (step + 1) / 20)
        inputs, truth = self.batch(step)
        self.network.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(inputs)
        loss = adaptation_loss(logits, truth)
        if not math.isfinite(loss.item()):
            raise TrainingDivergedError(
                f"adapter: loss became {loss.item()} at step {step}; lower adapter_learning_rate "
                f"(now {self.settings.adapter_learning_rate}) or look for scans with extreme intensities"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimiser.step()
        given = inputs[:, self.network.images :].unflatten(1, (2, -1)).mean(1)
        self.logs = {
            "loss": loss.item(),
            "dice_before": _dice(given > 0.5, truth > 0.5),
            "dice_after": _dice(logits.detach() > 0, truth > 0.5),
        }


def _dice(a: Tensor, b: Tensor) -> float:
    return float((2 * (a & b).sum() + 1) / (a.sum() + b.sum() + 1))


def train(
    labelled: Sequence[Prepared],
    sam: SAMModel | None,
    settings: Settings,
    out: Path,
    *,
    faults: Faults | None = None,
    report: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Train the adaptation network.

    Args:
        labelled: Cases with a human label, on one working spacing; their weights are ignored.
        sam: Fine-tuned SAM, which redraws faulty masks of these cases before training starts; None trains on
            synthetic inputs only.
        settings: ``adapter_iterations``, ``adapter_learning_rate``, ``patch``, ``seed``, ``device``, labels.
        out: Model file to write (``*.safetensors``, kind ``adapter``).
        faults: Makes the masks with errors; by default synthetic ones.
        report: Called with (step, iterations, loss=...); before the first step with (0, iterations, redraws=...).

    Returns:
        ``loss``, ``dice_before`` and ``dice_after`` (training patches, mean of the last 100 steps; None without any),
        ``kappa`` (2 x R: SAM's, the SSL model's), ``redraws``, ``seconds``, ``steps``, ``patch``, ``sha256``.

    Raises:
        NotEnoughCasesError: No labelled case.
        TrainingDivergedError: The loss became NaN or infinite.
    """
    started = time.monotonic()
    cases = [c for c in labelled if c.label is not None]
    if not cases:
        raise NotEnoughCasesError("no labelled case to train the adapter on; draw at least one label and submit it")
    iterations, patch = settings.adapter_iterations, adapter_patch(cases, settings)
    rng = np.random.default_rng([settings.seed, 3])
    faults = faults or Faults(settings.label_set)
    bank = redraw_bank(cases, sam, settings, rng, report, faults) if sam is not None and iterations else None
    strides = strides_for(np.median([c.grid.spacing for c in cases], axis=0).tolist())
    trainer, history = Trainer(Samples(cases, settings, patch, bank, faults), settings, strides), []

    engine = Engine(lambda _, number: trainer.step(number))

    @engine.on(Events.ITERATION_COMPLETED)
    def record(engine: Engine) -> None:
        history.append(trainer.logs)
        report(len(history), iterations, loss=float(np.mean([h["loss"] for h in history[-50:]])))

    if iterations:
        engine.run(range(iterations), max_epochs=1, epoch_length=iterations)
    save_weights(out, trainer.network.state_dict(), _metadata(settings, patch, strides, sam is not None))
    last = {k: float(np.mean([h[k] for h in history[-100:]])) for k in history[0]} if history else {}
    return {
        **dict.fromkeys(("loss", "dice_before", "dice_after")),
        **last,
        "kappa": trainer.network.kappa.detach().cpu().tolist(),
        "redraws": sum(map(len, bank)) if bank else 0,
        "seconds": time.monotonic() - started,
        "steps": iterations,
        "patch": list(patch),
        "sha256": sha256(out),
    }


def _metadata(
    settings: Settings, patch: Sequence[int], strides: Sequence[Sequence[int]], with_sam: bool
) -> dict[str, Any]:
    names, shown = list(settings.label_set.names), half_range(settings)
    around = [] if shown is None else [f"image relative to {names[n]}" for n in parents(settings.label_set)]
    return {
        "kind": "adapter",
        "labels": names,
        **({} if shown is None else {"relative": shown}),
        "channels": ["image", *around, *(f"sam {n}" for n in names), *(f"ssl {n}" for n in names)],
        "strides": strides,
        "patch": list(patch),
        "iterations": settings.adapter_iterations,
        "seed": settings.seed,
        "sam": with_sam,
    }


def adapter_patch(cases: Sequence[Prepared], settings: Settings) -> tuple[int, ...]:
    """Training patch: as the SSL model's, but of at most 64 x 64 x 32 voxels."""
    most = min(resolved(settings).patch_voxels, PATCH_VOXELS)
    limited = settings.model_copy(update={"patch_voxels": most})
    return automatic_patch([c.image.shape for c in cases], limited)
