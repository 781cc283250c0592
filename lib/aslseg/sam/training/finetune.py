"""Fine-tunes SAM on the labelled slices, with prompts that resemble those from the SSL model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from scipy import ndimage
from torch import Tensor, nn

from aslseg.cases.prepared_case import Prepared
from aslseg.cases.relative import centres, half_range, outermost, relative
from aslseg.compute.weights import save_weights
from aslseg.errors import BadSettingsError, NotEnoughCasesError, TrainingDivergedError
from aslseg.files import sha256
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.modeling.build import SAMModel, load
from aslseg.sam.modeling.lora import add_lora, merge_lora
from aslseg.sam.modeling.med2d_adapter import add_adapters
from aslseg.sam.predictor.embeddings import EmbeddingCache
from aslseg.sam.training.augment import augmented
from aslseg.sam.training.simulated_prompts import draw_kind, interaction_loss
from aslseg.settings import Settings
from aslseg.types import ProgressCallback, no_progress

# from a labelled case and a generator to region probabilities (R, i, j, k) with the errors of an SSL model
MaskCorruptor = Callable[[Prepared, np.random.Generator], np.ndarray]

OBJECTS_PER_SLICE = 3
MASKS_PER_CASE, MAX_MASKS = 3, 24  # faulty ones
FAULTY_FRACTION = 0.5  # of the slices of cases with faulty masks use them; other faulty prompts are made in 2-D
# jittered true boxes (docs/science.md §1.2), points as of annotators, and prompts as from an SSL mask
KINDS = {"box": 0.3, "point": 0.3, "faulty+box+point": 0.25, "faulty+box": 0.1, "faulty": 0.05}
CORRECTED_FRACTION = 0.75  # of the batches have rounds of clicks
CORRECTIONS = {"point": 3}  # rounds of clicks by kind, else one
RELATIVE_FRACTION = 0.5  # of the slices of nested labels; clicks are on slices as they are


@dataclass(frozen=True)
class SampledObjects:
    """Objects on a slice: case number, slice k, region, and the objects, bool (n, i, j).

    ``centre`` is that of relative intensities (:mod:`aslseg.cases.relative`), None where the slice is shown as it is.
    """

    case: int
    k: int
    region: int
    objects: np.ndarray
    centre: float | None = None


class LabelledSlices:
    """Samples slices with foreground, all regions that exist equally often.

    Args:
        labelled: Cases with a label.
        settings: Labels and ``min_component``.

    Raises:
        NotEnoughCasesError: No label holds any foreground.
    """

    def __init__(self, labelled: Sequence[Prepared], settings: Settings) -> None:
        self.cases = [c for c in labelled if c.label is not None]
        self.labels = settings.label_set
        self.min_component, self.half_range = settings.min_component, half_range(settings)
        self.outer = outermost(self.labels)
        self.centres: list[dict[int, float]] = []
        self.paths: list[list[tuple[int, int]]] = [[] for _ in self.labels.names]  # by region: (case, k)
        for n, case in enumerate(self.cases):
            regions = self.labels.regions(np.asarray(case.label))
            self.centres.append(centres(case.image, list(regions), self.labels) if self.half_range else {})
            for region, mask in enumerate(regions):
                self.paths[region] += [(n, int(k)) for k in np.flatnonzero(mask.any((0, 1)))]
        self.present = [r for r, paths in enumerate(self.paths) if paths]
        if not self.present:
            raise NotEnoughCasesError(
                f"none of the {len(self.cases)} labels holds {' or '.join(self.labels.names)}; SAM needs at least one "
                "labelled slice. Draw a label and submit it"
            )

    def draw(self, rng: np.random.Generator) -> SampledObjects:
        """Sample OBJECTS_PER_SLICE components of one region on one slice; small ones only where there are no others."""
        region = int(rng.choice(self.present))
        case, k = self.paths[region][int(rng.integers(len(self.paths[region])))]
        label = np.asarray(self.cases[case].label[..., k])  # type: ignore[index]
        mask = np.isin(label, self.labels.members(region))
        components, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        large = np.flatnonzero(sizes >= min(self.min_component, sizes.max())) + 1
        numbers = rng.choice(large, OBJECTS_PER_SLICE, replace=len(large) < OBJECTS_PER_SLICE)
        return SampledObjects(
            case, k, region, np.stack([components == n for n in numbers]), self._centre(case, region, rng)
        )

    def _centre(self, case: int, region: int, rng: np.random.Generator) -> float | None:
        outer = self.outer[region]
        if self.half_range is None or outer is None or rng.random() >= RELATIVE_FRACTION:
            return None
        return self.centres[case].get(outer)

    def slice(self, drawn: SampledObjects) -> np.ndarray:
        """The slice (i, j) in 0..1 as SAM is shown it."""
        pixels = np.asarray(self.cases[drawn.case].image[..., drawn.k], np.float32)
        if drawn.centre is None or self.half_range is None:
            return pixels
        return relative(pixels, drawn.centre, self.half_range)


class FaultyMasks:
    """Faulty masks of some cases in 3-D, made once because that is slow.

    Args:
        cases: Labelled cases; at most MAX_MASKS masks are made for a random part of them.
        errors: Makes a mask; None: there are none.
        rng: Source of all random numbers.
    """

    def __init__(self, cases: Sequence[Prepared], errors: MaskCorruptor | None, rng: np.random.Generator) -> None:
        self.made: dict[int, list[np.ndarray]] = {}
        each = max(1, min(MASKS_PER_CASE, MAX_MASKS // max(1, len(cases))))
        for n in sorted(rng.permutation(len(cases))[:MAX_MASKS].tolist()) if errors else ():
            drawn = [np.nan_to_num(errors(cases[n], rng)) for _ in range(each)]
            self.made[n] = [np.rint(255 * d).astype(np.uint8) for d in drawn]

    def of(self, drawn: SampledObjects, margin: float, rng: np.random.Generator) -> np.ndarray:
        """Faulty probabilities of each object, (n, i, j) float32.

        They are those of all components of one faulty mask that touch the object, widened by ``margin`` pixels, or
        zero where no component does.
        """
        out = np.zeros(drawn.objects.shape, np.float32)
        if drawn.case not in self.made or rng.random() >= FAULTY_FRACTION:
            return out
        choices = self.made[drawn.case]
        found = choices[int(rng.integers(len(choices)))][drawn.region, :, :, drawn.k]
        components, _ = ndimage.label(found > 127, EIGHT_NEIGHBOURS)
        for probability, true in zip(out, drawn.objects, strict=True):
            touched = np.isin(components, np.setdiff1d(components[true], 0))
            if touched.any():
                near = ndimage.binary_dilation(touched, EIGHT_NEIGHBOURS, iterations=max(1, int(margin)))
                probability[near] = found[near] / np.float32(255)
        return out


def train(
    labelled: Sequence[Prepared],
    settings: Settings,
    out: Path,
    *,
    init: Path,
    errors: MaskCorruptor | None = None,
    report: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Fine-tune SAM.

    Prompt encoder and mask decoder are always trained. Of the image encoder ``sam_train`` trains everything (``full``),
    SAM-Med2D's adapters (``med2d_adapter``; added where the file has none), LoRA (``lora``, merged into the weights
    that are saved), or nothing (``decoder``: each slice is then encoded once). In all modes but ``decoder``
    slices are augmented (:func:`aslseg.sam.training.augment.augmented`), with flips by the setting ``flips``. Half of
    the slices of nested labels have relative intensities (:mod:`aslseg.cases.relative`).

    Args:
        labelled: Human-labelled cases on the working grid; cases without a label are left out.
        settings: ``sam_train``, ``sam_lora_rank``, ``sam_iterations``, ``sam_batch``, ``sam_learning_rate``,
            ``flips``, ``seed``, ``box_margin``, labels.
        out: Model file to write (``*.safetensors``, kind ``sam``).
        init: SAM file to start from, see :func:`aslseg.sam.modeling.build.load`.
        errors: Makes faulty masks of a case in 3-D, for prompts that resemble those from the SSL model. Without it they
            are all made slice by slice.
        report: Called with (step, iterations, loss=..., dice=...).

    Returns:
        ``loss`` and ``dice`` (means of the last fifth of the steps), ``first_loss`` (of the first), ``steps``,
        ``seconds``, ``slices``, ``absent`` (labels that no case holds), ``parameters`` (trained values), ``sha256``.

    Raises:
        NotEnoughCasesError: No labelled slice.
        TrainingDivergedError: The loss became NaN or infinite.
        BadSettingsError: An odd token grid is to get adapters.
        BadWeightsError: As :func:`aslseg.sam.modeling.build.load`.
    """
    started = time.monotonic()
    data = LabelledSlices(labelled, settings)
    model = load(init, settings)
    tuner = _Tuner(model, data, errors, settings)
    shown = run_steps(tuner.step, settings, report)
    if settings.sam_train == "lora":
        merge_lora(model.sam.image_encoder)
    seen = {} if data.half_range is None else {"relative": data.half_range}
    save_weights(out, model.sam.state_dict(), file_metadata(model, settings, init) | seen)
    return {
        **summary(shown),
        "seconds": time.monotonic() - started,
        "slices": len({place for paths in data.paths for place in paths}),
        "parameters": sum(p.numel() for p in tuner.trained),
        "absent": [name for n, name in enumerate(data.labels.names) if n not in data.present],
        "sha256": sha256(out),
    }


def run_steps(
    step: Callable[[int], tuple[float, float]], settings: Settings, report: ProgressCallback
) -> list[tuple[float, float]]:
    """Run ``sam_iterations`` steps, which get their number, and return their losses and Dices; reports means of 20."""
    shown: list[tuple[float, float]] = []
    engine = Engine(lambda engine, number: shown.append(step(number)))

    @engine.on(Events.ITERATION_COMPLETED)
    def watch(engine: Engine) -> None:
        loss, dice = np.mean(shown[-20:], axis=0)
        report(len(shown), settings.sam_iterations, loss=float(loss), dice=float(dice))

    if settings.sam_iterations:
        engine.run(range(settings.sam_iterations), max_epochs=1)
    return shown


def file_metadata(model: SAMModel, settings: Settings, init: Path) -> dict[str, Any]:
    """The metadata of a fine-tuned file."""
    return {
        **{name: value for name, value in model.metadata.items() if name != "relative"},
        "architecture": model.architecture.to_metadata(),
        "labels": list(settings.label_set.names),
        "base_sha256": sha256(init),
        "trained": settings.sam_train,
        "iterations": settings.sam_iterations,
        "seed": settings.seed,
    }


def summary(shown: list[tuple[float, float]]) -> dict[str, Any]:
    """Loss and Dice of the last fifth of the steps, and the loss of the first."""
    if not shown:
        return {"loss": None, "dice": None, "first_loss": None, "steps": 0}
    fifth = max(1, len(shown) // 5)
    (first, _), (last, dice) = (np.mean(part, axis=0) for part in (shown[:fifth], shown[-fifth:]))
    return {"loss": float(last), "dice": float(dice), "first_loss": float(first), "steps": len(shown)}


def update(
    loss: Tensor, trained: list[nn.Parameter], optimiser: torch.optim.Optimizer, rate: float, number: int
) -> None:
    """One optimiser step with this learning rate and gradients of at most unit length.

    Raises:
        TrainingDivergedError: The loss is not finite.
    """
    if not math.isfinite(loss.item()):
        raise TrainingDivergedError(
            f"SAM's loss became {loss.item()} at step {number}; lower sam_learning_rate "
            f"(now {optimiser.defaults['lr']}) or look for scans with extreme intensities"
        )
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    # as in the SSL engine: a step whose bfloat16 gradients overflowed is skipped
    if torch.isfinite(nn.utils.clip_grad_norm_(trained, 1.0)):
        optimiser.step()


def trainable(model: SAMModel, settings: Settings) -> list[nn.Parameter]:
    """Make exactly those parameters trainable that ``sam_train`` names; adds adapters or LoRA.

    Args:
        model: Changed in place, and its architecture.
        settings: ``sam_train``, ``sam_lora_rank``, ``seed``.

    Returns:
        The trained parameters.

    Raises:
        BadSettingsError: An odd token grid is to get adapters.
    """
    sam, generator = model.sam, torch.Generator().manual_seed(settings.seed)
    encoder = sam.image_encoder
    sam.requires_grad_(True)
    encoder.requires_grad_(settings.sam_train == "full")
    if settings.sam_train == "lora":
        add_lora(encoder, settings.sam_lora_rank, generator)
    elif settings.sam_train == "med2d_adapter":
        if model.architecture.grid % 2:
            raise BadSettingsError(
                f"sam_train med2d_adapter: {model.image_size} px make a grid of {model.architecture.grid} tokens, its "
                f"adapters need an even one; set sam_image_size to a multiple of {2 * model.architecture.patch_size}"
            )
        if not model.architecture.adapters:
            add_adapters(encoder, generator)
            model.architecture = replace(model.architecture, adapters=True)
        for block in encoder.blocks:
            block.Adapter.requires_grad_(True)
    return [p for p in sam.parameters() if p.requires_grad]


class _Tuner:
    """Model, optimiser and one training step that depends on nothing but seed and step number."""

    def __init__(self, model: SAMModel, data: LabelledSlices, errors: MaskCorruptor | None, settings: Settings) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.faults = FaultyMasks(data.cases, errors, np.random.default_rng(settings.seed))
        self.cache = EmbeddingCache(settings.embedding_memory_mb * 1e6)
        self.frozen = settings.sam_train == "decoder"
        self.trained = trainable(model, settings)
        model.architecture = model.architecture.with_conventions(box_mask=True)
        self.optimiser = torch.optim.AdamW(self.trained, settings.sam_learning_rate, weight_decay=0.01)

    def step(self, number: int) -> tuple[float, float]:
        """One optimiser step: loss and mean Dice of the answers."""
        s = self.settings
        rng = np.random.default_rng([s.seed, number])
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + number)
        self.model.sam.train()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.model.bf16):
            embeddings, targets, faulty = self._batch(rng)
            kind = draw_kind(generator, KINDS)
            loss, dice = interaction_loss(
                self.model,
                embeddings,
                targets,
                kind,
                generator,
                CORRECTIONS.get(kind, 1) if rng.random() < CORRECTED_FRACTION else 0,
                faulty.cpu(),
                refine=kind in ("point", "box"),
                mask_alone=True,
            )
        rate = s.sam_learning_rate * _schedule(number, s.sam_iterations)
        update(loss, self.trained, self.optimiser, rate, number)
        return loss.item(), dice

    def _embedding(self, drawn: SampledObjects) -> Tensor:
        """(1, C, grid, grid) of a slice, encoded once in the whole training."""
        place = (drawn.case, drawn.k, drawn.centre)
        return self.cache.embed(self.model, [place], lambda _: self.data.slice(drawn))

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (P, C, grid, grid), targets and faulty masks (P, l, l) in 0..1 for the prompts of one step."""
        inputs, maps = [], []
        for _ in range(self.settings.sam_batch):
            drawn = self.data.draw(rng)
            case = self.data.cases[drawn.case]
            margin = self.settings.box_margin / min(self.model.scale((case.image.shape[0], case.image.shape[1])))
            both = np.stack([drawn.objects.astype(np.float32), self.faults.of(drawn, margin, rng)])
            if self.frozen:
                inputs.append(self._embedding(drawn))
            else:
                image, both = augmented(self.data.slice(drawn), both, rng, self.settings.flips)
                inputs.append(self.model.preprocess(torch.from_numpy(image)[None]))
            low = self.model.to_low_res(torch.from_numpy(both).flatten(0, 1)).unflatten(0, (2, OBJECTS_PER_SLICE))
            maps.append(torch.stack([visible(low[0]), low[1]]))
        together, (targets, faulty) = torch.cat(inputs), torch.cat(maps, 1)
        embeddings = together if self.frozen else self.model.sam.image_encoder(together)
        return embeddings.repeat_interleave(OBJECTS_PER_SLICE, 0), targets, faulty


def visible(objects: Tensor) -> Tensor:
    """Objects (n, l, l) in 0..1 of which each has a pixel above 0.5, as prompts need.

    An object that the low resolution blurs away is scaled to its own peak.
    """
    peak = objects.amax((1, 2), keepdim=True).clamp(min=1e-6)
    return torch.where(peak > 0.5, objects, objects / peak)


def _schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up in a tenth of the steps, times half a cosine over all steps."""
    warm = max(1, steps // 10)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
