"""Fine-tuning SAM on the labelled slices, with prompts that look like the SSL model's."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from scipy import ndimage
from torch import Tensor, nn

from aslseg.errors import NotEnoughCasesError, TrainingDivergedError
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.build import SAMModel, load
from aslseg.sam.embeddings import EmbeddingCache
from aslseg.sam.training import draw_kind, interaction_loss
from aslseg.settings import Settings
from aslseg.types import Prepared, Report, silent
from aslseg.weights import save_weights, sha256

OBJECTS_PER_SLICE = 3
# half of the first prompts are jittered true boxes (science.md, section 1.2), the others what an SSL mask would give
KINDS = {"box": 0.4, "point": 0.1, "faulty+box+point": 0.3, "faulty+box": 0.15, "faulty": 0.05}


class LabelledSlices:
    """Slices with foreground, drawn so that every region present comes up equally often.

    Args:
        labelled: Cases with a label.
        settings: Labels and smallest component.

    Raises:
        NotEnoughCasesError: No label holds any foreground.
    """

    def __init__(self, labelled: Sequence[Prepared], settings: Settings) -> None:
        self.cases = [c for c in labelled if c.label is not None]
        self.labels = settings.label_set
        self.places: list[list[tuple[int, int]]] = [[] for _ in self.labels.names]  # by region: (case, k)
        for n, case in enumerate(self.cases):
            for region, mask in enumerate(self.labels.regions(np.asarray(case.label))):
                self.places[region] += [(n, int(k)) for k in np.flatnonzero(mask.any((0, 1)))]
        self.present = [r for r, places in enumerate(self.places) if places]
        if not self.present:
            raise NotEnoughCasesError(
                f"none of the {len(self.cases)} labels holds {' or '.join(self.labels.names)}; SAM needs at least one "
                "labelled slice. Draw a label and submit it"
            )

    def draw(self, rng: np.random.Generator) -> tuple[int, int, np.ndarray]:
        """Case number, slice k, and OBJECTS_PER_SLICE components of one region, bool (n, i, j)."""
        region = int(rng.choice(self.present))
        case, k = self.places[region][int(rng.integers(len(self.places[region])))]
        label = np.asarray(self.cases[case].label[..., k])  # type: ignore[index]
        mask = np.isin(label, self.labels.members(region))
        components, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
        numbers = rng.choice(count, OBJECTS_PER_SLICE, replace=count < OBJECTS_PER_SLICE) + 1
        return case, k, np.stack([components == n for n in numbers])


def train(
    labelled: Sequence[Prepared], settings: Settings, out: Path, *, init: Path, report: Report = silent
) -> dict[str, Any]:
    """Fine-tune SAM.

    ``sam_train = full`` trains everything on flipped slices of varied contrast; ``decoder`` keeps the image encoder as
    it is and encodes each slice once.

    Args:
        labelled: Human-labelled cases on the working grid; cases without a label are passed over.
        settings: ``sam_train``, ``sam_iterations``, ``sam_batch``, ``sam_learning_rate``, ``seed``, labels.
        out: Model file to write (``*.safetensors``, kind ``sam``).
        init: SAM file to start from, see :func:`aslseg.sam.build.load`.
        report: Called with (step, iterations, loss=..., dice=...).

    Returns:
        ``loss`` and ``dice`` (means of the last fifth of the steps), ``first_loss`` (of the first), ``steps``,
        ``seconds``, ``slices``, ``absent`` (labels that no case holds), ``sha256``.

    Raises:
        NotEnoughCasesError: No labelled slice.
        TrainingDivergedError: The loss became NaN or infinite.
        BadWeightsError: As :func:`aslseg.sam.build.load`.
    """
    started = time.monotonic()
    data = LabelledSlices(labelled, settings)
    model = load(init, settings)
    tuner = _Tuner(model, data, settings)
    shown: list[tuple[float, float]] = []

    engine = Engine(lambda engine, number: shown.append(tuner.step(number)))

    @engine.on(Events.ITERATION_COMPLETED)
    def watch(engine: Engine) -> None:
        loss, dice = np.mean(shown[-20:], axis=0)
        report(len(shown), settings.sam_iterations, loss=float(loss), dice=float(dice))

    if settings.sam_iterations:
        engine.run(range(settings.sam_iterations), max_epochs=1)
    save_weights(out, model.sam.state_dict(), _metadata(model, settings, init))
    return {
        **_summary(shown),
        "seconds": time.monotonic() - started,
        "slices": len({place for places in data.places for place in places}),
        "absent": [name for n, name in enumerate(data.labels.names) if n not in data.present],
        "sha256": sha256(out),
    }


def _metadata(model: SAMModel, settings: Settings, init: Path) -> dict[str, Any]:
    return {
        **model.metadata,
        "labels": list(settings.label_set.names),
        "base_sha256": sha256(init),
        "trained": settings.sam_train,
        "iterations": settings.sam_iterations,
        "seed": settings.seed,
    }


def _summary(shown: list[tuple[float, float]]) -> dict[str, Any]:
    """Loss and Dice of the last fifth of the steps, and the loss of the first."""
    if not shown:
        return {"loss": None, "dice": None, "first_loss": None, "steps": 0}
    fifth = max(1, len(shown) // 5)
    (first, _), (last, dice) = (np.mean(part, axis=0) for part in (shown[:fifth], shown[-fifth:]))
    return {"loss": float(last), "dice": float(dice), "first_loss": float(first), "steps": len(shown)}


class _Tuner:
    """Model, optimiser and one training step that depends on nothing but seed and step number."""

    def __init__(self, model: SAMModel, data: LabelledSlices, settings: Settings) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.cache = EmbeddingCache()
        self.frozen = settings.sam_train == "decoder"
        model.sam.requires_grad_(True)
        model.sam.image_encoder.requires_grad_(not self.frozen)
        self.trained = [p for p in model.sam.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, settings.sam_learning_rate, weight_decay=0.01)

    def step(self, number: int) -> tuple[float, float]:
        """One optimiser step: loss and mean Dice of the answers."""
        s = self.settings
        rng = np.random.default_rng([s.seed, number])
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + number)
        for group in self.optimiser.param_groups:
            group["lr"] = s.sam_learning_rate * _schedule(number, s.sam_iterations)
        self.model.sam.train()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.model.bf16):
            embeddings, targets = self._batch(rng)
            kind = draw_kind(generator, KINDS)
            loss, dice = interaction_loss(self.model, embeddings, targets, kind, generator)
        if not math.isfinite(loss.item()):
            raise TrainingDivergedError(
                f"SAM's loss became {loss.item()} at step {number}; lower sam_learning_rate "
                f"(now {s.sam_learning_rate}) or look for scans with extreme intensities"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        return loss.item(), dice

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Embeddings (P, C, grid, grid) and targets (P, l, l) in 0..1 for the prompts of one step."""
        inputs, targets = [], []
        for _ in range(self.settings.sam_batch):
            number, k, objects = self.data.draw(rng)
            case = self.data.cases[number]
            if self.frozen:
                inputs.append(self.cache.get(self.model, case.image, [k], number))
            else:
                image, objects = _augmented(np.asarray(case.image[..., k], np.float32), objects, rng)
                inputs.append(self.model.preprocess(torch.from_numpy(image)[None]))
            targets.append(self.model.to_low_res(torch.from_numpy(objects.astype(np.float32))))
        together = torch.cat(inputs)
        embeddings = together if self.frozen else self.model.sam.image_encoder(together)
        return embeddings.repeat_interleave(OBJECTS_PER_SLICE, 0), torch.cat(targets)


def _augmented(image: np.ndarray, objects: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A slice (i, j) and its objects (n, i, j), both flipped, the slice with another gamma and contrast."""
    for axis in (0, 1):
        if rng.random() < 0.5:
            image, objects = np.flip(image, axis), np.flip(objects, axis + 1)
    image = np.clip(image, 0, 1) ** rng.uniform(0.8, 1.25) * rng.uniform(0.9, 1.1) + rng.uniform(-0.05, 0.05)
    return np.clip(image, 0, 1).astype(np.float32), np.ascontiguousarray(objects)


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: a tenth of the steps to warm up, then half a cosine."""
    warm = max(1, steps // 10)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
