"""The one training engine of all SSL methods, on ignite: two streams, bf16, atomic resumable checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from aslseg.cases.patches import PatchSampler
from aslseg.cases.prepare import Spacing, automatic_patch
from aslseg.errors import NotEnoughCasesError, TrainingDivergedError
from aslseg.registry import NETWORKS, SSL_METHODS
from aslseg.settings import Settings
from aslseg.ssl.augment import centre, random_geometry, random_intensity, warp
from aslseg.ssl.methods.base import Batch, Method
from aslseg.ssl.networks import bfloat16_pays
from aslseg.ssl.ramps import polynomial
from aslseg.types import Prepared, Report, silent
from aslseg.weights import atomic_file, load_weights, save_weights, sha256

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = 250
COLLAPSE_WINDOW = 200
STATISTICS_BATCHES = 30


def choose_device(settings: Settings) -> torch.device:
    """The device of the setting ``device``; ``auto`` takes a GPU where there is one."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


class Trainer:
    """One training run: batches by step number, the method, the optimiser.

    Args:
        labelled: Human-labelled cases, and promoted ones (these carry ``voxel_weight``).
        unlabelled: Cases whose labels, if any, are never looked at.
        settings: Method, network, batch, seed.
        iterations: Steps of the whole run.
    """

    def __init__(
        self,
        labelled: Sequence[Prepared],
        unlabelled: Sequence[Prepared],
        settings: Settings,
        iterations: int,
    ) -> None:
        if not any(c.label is not None for c in labelled):
            raise NotEnoughCasesError("no labelled case to train on; draw at least one label and submit it")
        self.settings, self.iterations = settings, iterations
        self.device = choose_device(settings)
        self.patch = automatic_patch([c.image.shape for c in labelled], settings)
        # oneDNN's bfloat16 weight gradient of a 2 x 2 feature map differs from run to run (seen in torch 2.11)
        self.bf16 = bfloat16_pays(self.device) and min(self.patch[:2]) >= 48
        classes = len(settings.label_set)
        self.labelled = PatchSampler(labelled, self.patch, classes)
        self.unlabelled = PatchSampler([_blind(c) for c in unlabelled], self.patch, classes) if unlabelled else None
        torch.manual_seed(settings.seed)
        factory = NETWORKS.get(settings.network)
        self.method: Method = SSL_METHODS.get(settings.ssl_method)(
            lambda extra=0: factory(classes + 1 + extra, self.patch), settings
        )
        self.method.to(self.device, memory_format=torch.channels_last_3d)
        self.optimiser = torch.optim.SGD(
            [p for p in self.method.parameters() if p.requires_grad],
            settings.learning_rate,
            momentum=0.9,
            weight_decay=1e-4,
            nesterov=True,
        )

    def batch(self, step: int) -> Batch:
        """The patches of a step, augmented, on the device; depends on nothing but seed and step."""
        s = self.settings
        rng = np.random.default_rng([s.seed, step])
        torch.manual_seed(s.seed * 1_000_003 + step)
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
        drawn = [self.labelled.draw(rng) for _ in range(s.batch_labelled)]
        image = self._images([d.image for d in drawn])
        maps = torch.stack([torch.from_numpy(np.stack([d.label, d.weight])) for d in drawn]).to(self.device)
        grid = random_geometry(image.shape, generator)
        image = random_intensity(warp(image, grid), generator)
        maps = warp(maps.float(), grid, "nearest")
        if self.unlabelled and s.batch_unlabelled and s.ssl_method != "supervised":
            free = self._images([self.unlabelled.draw(rng).image for _ in range(s.batch_unlabelled)])
            free = random_intensity(warp(free, random_geometry(free.shape, generator)), generator)
        else:
            free = image[:0]
        layout = torch.channels_last_3d
        return Batch(
            centre(image).contiguous(memory_format=layout),
            maps[:, 0].long(),
            maps[:, 1],
            centre(free).contiguous(memory_format=layout),
        )

    def _images(self, crops: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(crops))[:, None].to(self.device)

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step."""
        part = step / self.iterations
        batch = self.batch(step)
        generator = torch.Generator().manual_seed(self.settings.seed * 7_919 + step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * polynomial(part)
        self.method.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, logs = self.method.loss(batch, part, generator)
        if not math.isfinite(loss.item()):
            raise TrainingDivergedError(
                f"loss became {loss.item()} at step {step}; lower learning_rate (now {self.settings.learning_rate}) "
                "or look for scans with extreme intensities"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # bfloat16 through batch norm over few voxels can overflow; such a step says nothing
        if torch.isfinite(nn.utils.clip_grad_norm_(self.method.parameters(), 10.0)):
            self.optimiser.step()
            self.method.after_step(step, part)
        return {"loss": loss.item(), "truth": (batch.target > 0).float().mean().item(), **logs}

    @torch.no_grad()
    def refresh_statistics(self) -> None:
        """Batch-norm statistics of the predicting network, gathered afresh over training patches.

        An EMA teacher's weights never ran through its own normalisation at full length (as with weight averaging,
        Izmailov et al. 2018), and without unlabelled scans not at all.
        """
        network = self.method.predictor.eval()
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for step in range(STATISTICS_BATCHES if norms else 0):
            batch = self.batch(self.iterations + step)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                network(torch.cat([batch.image, batch.unlabelled]))

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {"method": self.method.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.method.load_state_dict(state["method"])
        self.optimiser.load_state_dict(state["optimiser"])


def train(
    labelled: Sequence[Prepared],
    unlabelled: Sequence[Prepared],
    settings: Settings,
    out: Path,
    *,
    iterations: int,
    spacing: Spacing,
    init: Path | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Train the SSL model.

    A checkpoint beside ``out`` is written every 250 steps; a run with the same inputs that finds one goes on
    from it and ends with the same weights as an uninterrupted run.

    Args:
        labelled: Human-labelled cases, and promoted ones with ``voxel_weight``.
        unlabelled: Cases for the unlabelled stream.
        settings: See :class:`Settings`.
        out: Model file to write (``*.safetensors``, kind ``ssl``).
        iterations: Training steps.
        spacing: Working spacing in mm, stored with the model.
        init: Model to start from; None starts from random weights.
        report: Called with (step, iterations, loss=...).

    Returns:
        ``loss`` (mean of the last 100 steps), ``seconds``, ``steps``, ``patch``, ``sha256``.

    Raises:
        NotEnoughCasesError: No labelled case.
        TrainingDivergedError: NaN, or collapse to the empty mask.
    """
    started = time.monotonic()
    trainer = Trainer(labelled, unlabelled, settings, iterations)
    metadata = _metadata(trainer, spacing, init)
    if init is not None:
        trainer.method.start_from(load_weights(init, "ssl")[0])
    checkpoint = out.with_name(f"{out.stem}.checkpoint.pt")
    fingerprint = _fingerprint(metadata, settings, labelled, unlabelled)
    first = _resume(trainer, checkpoint, fingerprint)
    losses = _run(trainer, first, checkpoint, fingerprint, report)
    trainer.refresh_statistics()
    save_weights(out, trainer.method.predictor.state_dict(), metadata)
    checkpoint.unlink(missing_ok=True)
    return {
        "loss": float(np.mean(losses[-100:])) if losses else None,
        "seconds": time.monotonic() - started,
        "steps": iterations - first,
        "patch": list(trainer.patch),
        "sha256": sha256(out),
    }


def _run(trainer: Trainer, first: int, checkpoint: Path, fingerprint: str, report: Report) -> list[float]:
    """The steps from ``first`` on, watched, reported and checkpointed; returns their losses."""
    total = trainer.iterations
    losses: list[float] = []
    predicted: list[float] = []
    true: list[float] = []

    def step(_: Engine, number: int) -> dict[str, float]:
        return trainer.step(number)

    def watch(engine: Engine) -> None:
        logs: Any = engine.state.output
        losses.append(logs["loss"])
        predicted.append(logs["foreground"])
        true.append(logs["truth"])
        done = first + engine.state.iteration
        _check_collapse(predicted, true, done / total, trainer.settings)
        report(done, total, loss=float(np.mean(losses[-50:])))

    def keep(engine: Engine) -> None:
        done = first + engine.state.iteration
        if done % CHECKPOINT_EVERY == 0 and done < total:
            content = {"step": done, "fingerprint": fingerprint, **trainer.state()}
            with atomic_file(checkpoint) as temporary:
                torch.save(content, temporary)

    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED, watch)
    engine.add_event_handler(Events.ITERATION_COMPLETED, keep)
    if first < total:
        engine.run(range(first, total), max_epochs=1, epoch_length=total - first)
    return losses


def _metadata(trainer: Trainer, spacing: Spacing, init: Path | None) -> dict[str, Any]:
    """What a model file says about itself."""
    settings = trainer.settings
    return {
        "kind": "ssl",
        "labels": list(settings.label_set.names),
        "network": settings.network,
        "method": settings.ssl_method,
        "outputs": len(settings.label_set) + 1 + trainer.method.extra_outputs,
        "patch": list(trainer.patch),
        "spacing": None if spacing is None else list(spacing),
        "modality": settings.modality,
        "window": [settings.window_low, settings.window_high],
        "iterations": trainer.iterations,
        "seed": settings.seed,
        "init": sha256(init) if init else None,
    }


def _blind(case: Prepared) -> Prepared:
    """The case without anything that a label could have come from."""
    return Prepared(case.id, case.patient, case.image, case.grid)


def _fingerprint(
    metadata: dict[str, Any], settings: Settings, labelled: Sequence[Prepared], unlabelled: Sequence[Prepared]
) -> str:
    cases = [(c.id, list(c.image.shape), c.weight) for c in (*labelled, *unlabelled)]
    chosen = settings.model_dump(exclude={"device", "threads", "home", "model_dir", "min_free_gb"})
    return hashlib.sha256(json.dumps([metadata, chosen, cases], sort_keys=True).encode()).hexdigest()


def _resume(trainer: Trainer, checkpoint: Path, fingerprint: str) -> int:
    """The step to go on from: 0 without a usable checkpoint of the same inputs."""
    if not checkpoint.exists():
        return 0
    try:
        state = torch.load(checkpoint, map_location=trainer.device, weights_only=True)
        if state["fingerprint"] != fingerprint:
            logger.info("%s belongs to other inputs; starting afresh", checkpoint.name)
            return 0
        trainer.load_state(state)
    except (RuntimeError, KeyError, EOFError, ValueError, OSError) as error:
        logger.warning("%s is damaged (%s); starting afresh", checkpoint.name, type(error).__name__)
        return 0
    logger.info("going on from step %d of %d", state["step"], trainer.iterations)
    return int(state["step"])


def _check_collapse(predicted: list[float], true: list[float], part: float, settings: Settings) -> None:
    """Consistency alone is smallest for the empty mask; notice when training ends there (science.md §6.3 d)."""
    if part < 0.5 or len(predicted) < COLLAPSE_WINDOW:
        return
    got, expected = float(np.mean(predicted[-COLLAPSE_WINDOW:])), float(np.mean(true[-COLLAPSE_WINDOW:]))
    if expected > 0 and got < 0.05 * expected:
        raise TrainingDivergedError(
            f"collapsed to the empty mask: {got:.2%} of the labelled patches predicted as foreground, {expected:.2%} "
            f"labelled; lower consistency (now {settings.consistency}) or train longer (ssl_iterations)"
        )
