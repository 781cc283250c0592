"""The one training engine of all SSL methods, on ignite: two streams, bf16, atomic resumable checkpoints.

How a run is set up, resumed, watched and spread over several GPUs: docs/training.md.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from aslseg.cases.prepare import Spacing, automatic_patch
from aslseg.cases.prepared_case import Prepared, human_labelled, load_within_budget
from aslseg.compute.device import bfloat16_pays, choose_device
from aslseg.compute.hardware import resolved
from aslseg.compute.schedules import SCHEDULES
from aslseg.compute.weights import load_weights, read_metadata, save_weights
from aslseg.errors import NotEnoughCasesError, OutOfTimeError, TrainingDivergedError
from aslseg.files import sha256
from aslseg.registry import NETWORKS, SSL_METHODS
from aslseg.settings import Settings
from aslseg.ssl import checkpoint, compiling, distributed, tracking
from aslseg.ssl.batches import Batches
from aslseg.ssl.class_watch import Probabilities, class_probabilities, described, not_learned, warnings_of
from aslseg.ssl.methods.base import Batch, Method
from aslseg.ssl.monitor import TrainingMonitor
from aslseg.ssl.nested_batches import NestedBatches
from aslseg.types import ProgressCallback, no_progress

logger = logging.getLogger(__name__)

# whichever comes first
CHECKPOINT_EVERY = 250
CHECKPOINT_MINUTES = 10.0
MOST_SKIPPED = 20
STATISTICS_BATCHES = 30
CLASS_BATCHES = 8


class Trainer:
    """One training run: batches by step number, the method, the optimiser.

    Args:
        labelled: Human-labelled cases, and promoted ones (these carry ``voxel_weight``).
        unlabelled: Cases whose labels, if any, are never looked at.
        settings: Method, network, batch, seed.
        iterations: Steps of the whole run.
        init: Model to start from; None starts from random weights.
    """

    def __init__(
        self,
        labelled: Sequence[Prepared],
        unlabelled: Sequence[Prepared],
        settings: Settings,
        iterations: int,
        init: Path | None = None,
    ) -> None:
        if not any(c.label is not None for c in labelled):
            raise NotEnoughCasesError("no labelled case to train on; draw at least one label and submit it")
        tracking.check(settings.tracking)
        settings = resolved(settings)
        self.settings, self.iterations = settings, iterations
        self.device = choose_device(settings)
        # promoted masks decide nothing of it: a network's layers may depend on it, and those of ``init`` have to fit
        self.patch = automatic_patch([c.image.shape for c in human_labelled(labelled)], settings)
        # oneDNN's bfloat16 weight gradient of a 2 x 2 feature map differs from run to run (seen in torch 2.11)
        self.bf16 = bfloat16_pays(self.device) and min(self.patch[:2]) >= 48
        cases = self._held([*labelled, *map(without_label, unlabelled)])
        source = NestedBatches if labelled[0].relative else Batches
        self.batches = source(cases[: len(labelled)], cases[len(labelled) :], settings, self.patch, self.device)
        torch.manual_seed(settings.seed)
        factory, outputs = NETWORKS.get(settings.network), len(settings.label_set) + 1
        self.method: Method = SSL_METHODS.get(settings.ssl_method)(
            lambda extra=0: factory(outputs + extra, self.patch, **self.batches.network), settings
        )
        self.method.to(self.device, memory_format=torch.channels_last_3d)
        if init is not None:
            self.method.start_from(load_weights(init, "ssl")[0])
        self.optimiser = torch.optim.SGD(
            [p for p in self.method.parameters() if p.requires_grad],
            settings.learning_rate,
            momentum=0.9,
            weight_decay=1e-4,
            nesterov=True,
        )
        self.skipped, self.skipped_in_a_row = 0, 0
        self.compiled = settings.compile
        if self.compiled:
            compiling.compile_networks(self.method)

    def _held(self, cases: list[Prepared]) -> list[Prepared]:
        """The cases where crops are quickest: on the GPU, then in memory, then on disk, within the budget."""
        budget = self.settings.training_memory_gb * 1e9 / distributed.world()
        if self.device.type == "cuda":
            cases = load_within_budget(cases, min(budget, torch.cuda.mem_get_info(self.device)[0] / 2), self.device)
        return load_within_budget(cases, budget)

    def batch(self, step: int) -> Batch:
        """The patches of a step; see :class:`Batches`."""
        return self.batches(step)

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step, of the mean gradient of ``accumulate`` batches.

        Raises:
            TrainingDivergedError: The loss is not finite, or gradients were not for 20 steps in a row.
        """
        fraction = step / self.iterations
        rate = self.settings.learning_rate * SCHEDULES[self.settings.schedule](fraction)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.method.train()
        logs = self._gradients_or_eager(step, fraction)
        if not math.isfinite(logs["loss"]):
            raise TrainingDivergedError(
                f"loss became {logs['loss']} at step {step}; lower learning_rate (now {self.settings.learning_rate}) "
                "or look for scans with extreme intensities"
            )
        # bfloat16 through batch norm over few voxels can overflow; such a step says nothing
        if torch.isfinite(nn.utils.clip_grad_norm_(self.method.parameters(), 10.0)):
            self.optimiser.step()
            self.method.after_step(step, fraction)
            self.skipped_in_a_row = 0
        else:
            self._skip(step)
        return {**logs, "learning_rate": rate}

    def _gradients_or_eager(self, step: int, fraction: float) -> dict[str, float]:
        if not self.compiled:
            return self._gradients(step, fraction)
        try:
            return self._gradients(step, fraction)
        except compiling.ERRORS as error:
            logger.warning("torch.compile failed (%s); going on without", compiling.reason(error))
            self.compiled = False
            compiling.to_eager(self.method)
            return self._gradients(step, fraction)

    def _gradients(self, step: int, fraction: float) -> dict[str, float]:
        """Leave the step's gradients in the parameters, the same in every process; returns the mean of its numbers."""
        self.optimiser.zero_grad(set_to_none=True)
        batches = self.settings.accumulate
        found: list[dict[str, float]] = []
        for number in range(step * batches + distributed.rank(), (step + 1) * batches, distributed.world()):
            batch = self.batch(number)
            generator = torch.Generator().manual_seed(self.settings.seed * 7_919 + number)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss, logs = self.method.loss(batch, fraction, generator)
            (loss / batches).backward()
            found.append({"loss": loss.item(), "truth": (batch.target > 0).float().mean().item(), **logs})
        distributed.all_reduce_sum([p.grad for p in self.method.parameters() if p.grad is not None])
        distributed.all_reduce_mean([b for b in self.method.buffers() if b.is_floating_point()])
        return distributed.mean_numbers({name: float(np.mean([f[name] for f in found])) for name in found[0]})

    def _skip(self, step: int) -> None:
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingDivergedError(
                f"the gradients of the last {MOST_SKIPPED} steps up to step {step} were not finite, so that none "
                f"of them changed the network; lower learning_rate (now {self.settings.learning_rate}) or look for "
                "scans with extreme intensities"
            )

    @torch.no_grad()
    def refresh_statistics(self) -> None:
        """Batch-norm statistics of the predicting network, gathered afresh over training patches.

        An EMA teacher's weights never ran through its own normalisation at full length (as with weight averaging,
        Izmailov et al. 2018), and without unlabelled scans not at all.
        """
        if self.compiled:
            compiling.to_eager(self.method)
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

    def class_probabilities(self, network: nn.Module, first: int) -> Probabilities:
        """How well a network knows each class on labelled patches of some steps; see :mod:`aslseg.ssl.class_watch`."""
        batches = self.batches.watched(first, CLASS_BATCHES)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return class_probabilities(network, batches, self.settings.label_set.names)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "method": self.method.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "skipped": [self.skipped, self.skipped_in_a_row],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.method.load_state_dict(state["method"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.skipped, self.skipped_in_a_row = state["skipped"]

    def describe(self) -> str:
        """What is trained with what, in a line."""
        s, parameters = self.settings, sum(p.numel() for p in self.method.predictor.parameters())
        unlabelled = len(self.batches.unlabelled.cases) if self.batches.unlabelled else 0
        return (
            f"{s.ssl_method}, {s.network} with {parameters / 1e6:.2f} M parameters, {len(self.batches.labelled.cases)} "
            f"labelled and {unlabelled} unlabelled cases, {s.accumulate} x ({s.batch_labelled} + {s.batch_unlabelled}) "
            f"patches of {self.patch} a step, {distributed.world()} x {self.device} in "
            f"{'bfloat16' if self.bf16 else 'float32'}"
        )


def train(
    labelled: Sequence[Prepared],
    unlabelled: Sequence[Prepared],
    settings: Settings,
    out: Path,
    *,
    iterations: int,
    spacing: Spacing,
    init: Path | None = None,
    logs: Path | None = None,
    report: ProgressCallback = no_progress,
    reuse: bool = False,
) -> dict[str, Any]:
    """Train one network.

    A checkpoint beside ``out`` is written every 250 steps or ten minutes; a run with the same inputs that finds one
    goes on from it and ends with the same weights as an uninterrupted run.

    Args:
        labelled: Human-labelled cases, and promoted ones with ``voxel_weight``.
        unlabelled: Cases for the unlabelled stream.
        settings: See :class:`Settings`.
        out: Model file to write (``*.safetensors``, kind ``ssl``).
        iterations: Training steps.
        spacing: Working spacing in mm, stored with the model.
        init: Model to start from; None starts from random weights.
        logs: Folder for the curves that the setting ``tracking`` asks for; ``tracking`` beside ``out`` by default.
        report: Called with (step, iterations, loss=...); where it raises OutOfTimeError, a checkpoint is written first.
        reuse: A file that a run with the same inputs has written is left as it is.

    Returns:
        ``loss`` (of the last 100 steps), ``classes`` and ``not_learned`` (:mod:`aslseg.ssl.class_watch`), ``seconds``,
        ``seconds_per_step``, ``steps`` (of this call), ``skipped_steps`` (gradients not finite), ``patch``, ``sha256``.

    Raises:
        NotEnoughCasesError: No labelled case.
        TrainingDivergedError: NaN, or collapse to the empty mask.
        BadSettingsError: ``tracking`` asks for a package that is not installed.
    """
    started = time.monotonic()
    unlabelled, settings = [without_label(c) for c in unlabelled], resolved(settings)
    trainer = Trainer(labelled, unlabelled, settings, iterations, init)
    metadata = _metadata(trainer, spacing, init)
    path = out.with_name(f"{out.stem}.checkpoint.pt")
    owner = checkpoint.fingerprint(metadata, settings, trainer.method.state_dict(), labelled, unlabelled)
    metadata |= {"inputs": owner} if reuse else {}
    monitor = TrainingMonitor(iterations, report)
    if reuse and _written(trainer, out, owner):
        return _result(trainer, monitor, 0, started, None) | {"sha256": sha256(out)}
    first = _resume(trainer, monitor, path, owner)
    job = {"iterations": iterations, "init": str(init or ""), "checkpoint": str(path), "owner": owner, "first": first}
    with distributed.with_workers(labelled, unlabelled, settings, out.with_name(f"{out.stem}.share"), **job):
        seconds = _run(trainer, monitor, path, owner, logs or out.parent / "tracking")
    trainer.refresh_statistics()
    steps = iterations - first
    # before the file is there: where one is, nothing is trained or looked at again
    result = _result(trainer, monitor, steps, started, seconds / steps if steps else None)
    save_weights(out, trainer.method.predictor.state_dict(), metadata)
    path.unlink(missing_ok=True)
    return result | {"sha256": sha256(out)}


def _written(trainer: Trainer, out: Path, owner: str) -> bool:
    """Whether a run with the same inputs has written the file; then the trainer has its weights."""
    if not out.exists() or read_metadata(out).get("inputs") != owner:
        return False
    logger.info("%s: same inputs as before, reused", out.name)
    trainer.method.predictor.load_state_dict(load_weights(out, "ssl")[0])
    return True


def _result(
    trainer: Trainer, monitor: TrainingMonitor, steps: int, started: float, pace: float | None
) -> dict[str, Any]:
    """What :func:`train` returns, but for the file's hash."""
    classes = trainer.class_probabilities(trainer.method.predictor, trainer.iterations)
    for line in warnings_of(classes):
        logger.warning("%s", line)
    return {
        "loss": monitor.loss(100),
        "classes": classes,
        "not_learned": not_learned(classes),
        "seconds": time.monotonic() - started,
        "seconds_per_step": pace,
        "steps": steps,
        "skipped_steps": trainer.skipped,
        "patch": list(trainer.patch),
    }


def _resume(trainer: Trainer, monitor: TrainingMonitor, path: Path, owner: str) -> int:
    """The step to go on from: 0 without a usable checkpoint of the same inputs."""
    kept = checkpoint.read(path, owner, trainer.device)
    if kept is not None:
        trainer.load_state(kept)
        monitor.start_at(kept["step"], kept["recent"])
    logger.info("%s; steps %d to %d", trainer.describe(), monitor.done, trainer.iterations)
    return monitor.done


def _run(trainer: Trainer, monitor: TrainingMonitor, path: Path, owner: str, logs: Path) -> float:
    """The steps that are left, watched, checkpointed and tracked; returns the seconds they took."""
    total, first = trainer.iterations, monitor.done
    started = written = time.monotonic()
    ended: list[OutOfTimeError] = []

    def look(engine: Engine) -> None:
        logs: Any = engine.state.output
        monitor.update(logs)
        monitor.check_collapse(trainer.method.consistency_weight(1.0))
        try:
            monitor.report()
        except OutOfTimeError as error:
            write()
            ended.append(error)
            engine.terminate()

    def write() -> None:
        checkpoint.write(path, monitor.done, owner, {**trainer.state(), "recent": monitor.recent})

    def keep(_: Engine) -> None:
        nonlocal written
        now = time.monotonic()
        due = monitor.done % CHECKPOINT_EVERY == 0 or now - written > 60 * CHECKPOINT_MINUTES
        if due and monitor.done < total:
            write()
            written = time.monotonic()
            speed = (now - started) / (monitor.done - first)
            left = speed * (total - monitor.done) / 60
            logger.info(
                "step %d of %d, loss %.4f, %.3f s a step, %.0f min left%s",
                monitor.done,
                total,
                monitor.loss(50),
                speed,
                left,
                described(trainer.class_probabilities(trainer.method.student, monitor.done)),
            )

    engine = Engine(lambda _, number: trainer.step(number))
    engine.add_event_handler(Events.ITERATION_COMPLETED, look)
    engine.add_event_handler(Events.ITERATION_COMPLETED, keep)
    if first < total:
        with tracking.tracked(engine, trainer.settings, logs, f"{path.name.split('.')[0]}-{owner[:8]}", first):
            engine.run(range(first, total), max_epochs=1, epoch_length=total - first)
    if ended:
        raise ended[0]
    return time.monotonic() - started


def _metadata(trainer: Trainer, spacing: Spacing, init: Path | None) -> dict[str, Any]:
    """What a model file says about itself."""
    settings, options = trainer.settings, dict(trainer.batches.network)
    return {
        "kind": "ssl",
        "labels": list(settings.label_set.names),
        "network": settings.network,
        "method": settings.ssl_method,
        # only where there are any: checkpoints are recognised by what is said here
        **({"options": options} if options else {}),
        "outputs": len(settings.label_set) + 1 + trainer.method.extra_outputs,
        "patch": list(trainer.patch),
        "flips": settings.flips,
        "spacing": None if spacing is None else list(spacing),
        "modality": settings.modality,
        "window": [settings.window_low, settings.window_high],
        "iterations": trainer.iterations,
        "seed": settings.seed,
        "init": sha256(init) if init else None,
    }


def without_label(case: Prepared) -> Prepared:
    """The case without anything that a label could have come from."""
    return Prepared(case.id, case.patient, case.image, case.grid, relative=case.relative)
