"""Pre-train the small SAM that ships with the app, on generated slices and phantom CTs only.

    python scripts/pretrain_sam.py --minutes 50

Phases of growing size, with positional embeddings resized between them: what a prompt means is learned at 64 px,
where a step costs a tenth, borders at the full 192 px. Prompts are those of the click models. Minutes are processor
time. The weights are saved atomically every few minutes; ``--init`` goes on from them (``--begin 0.6``: at that part of
the schedule). The manifest beside them says how they were made.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset

from aslseg.compute.weights import load_weights, save_weights
from aslseg.files import sha256, write_json
from aslseg.sam.modeling.architecture import SMALL, Architecture, build
from aslseg.sam.modeling.build import SAMModel
from aslseg.sam.modeling.checkpoints import read, resized
from aslseg.sam.training.generated_slices import generated_slice
from aslseg.sam.training.simulated_prompts import (
    AS_CLICKED,
    CORRECTIONS,
    Prompts,
    PromptSimulation,
    draw_kind,
    first_prompts,
    interaction_loss,
)
from aslseg.types import Labels
from aslseg.volume.phantom import make_phantom

logger = logging.getLogger("pretrain_sam")
PROMPTS_PER_SLICE = 4
BATCH = 8
PHANTOM_PART = 0.2
HELD_OUT = 10**9  # indices from here on are never trained on


class Phantoms:
    """Axial slices of phantom CTs with their liver and tumours, looked at through windows of random width.

    Args:
        seed: Seed of the phantoms.
        cases: How many abdomens.
    """

    def __init__(self, seed: int, cases: int) -> None:
        self.slices: list[tuple[np.ndarray, np.ndarray]] = []
        for case in range(cases):
            volume, classes = make_phantom(seed, case)
            regions = Labels.parse("liver,tumour", "tumour:liver").regions(classes)
            for k in np.flatnonzero(classes.any((0, 1))):
                self.slices.append((volume.array[..., k], regions[..., k]))

    def draw(self, rng: np.random.Generator, image_size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An image (image_size, image_size) in 0..1 and ``count`` targets at half that size, in 0..1."""
        hu, regions = self.slices[int(rng.integers(len(self.slices)))]
        low, high = rng.uniform(-220, -100), rng.uniform(180, 300)
        image = np.clip((hu - low) / (high - low), 0, 1)
        objects = [part == n for part, number in map(ndimage.label, regions) for n in range(1, number + 1)]
        objects = [o for o in objects if o.sum() >= 6] or [regions[0]]
        chosen = np.stack([objects[n] for n in rng.choice(len(objects), count)])
        stack = np.concatenate([image[None], chosen]).astype(np.float32)
        stack = np.rot90(stack, int(rng.integers(4)), (1, 2))[:, :: int(rng.choice([-1, 1]))]
        both = F.interpolate(torch.from_numpy(stack.copy())[None], (image_size, image_size), mode="bilinear")[0]
        return both[0], F.avg_pool2d(both[1:], 2)


class Generated(Dataset):
    """Generated slices by index; the same seed and index give the same slice."""

    def __init__(self, seed: int, image_size: int, start: int, length: int, phantoms: Phantoms | None = None) -> None:
        self.seed, self.image_size, self.start, self.length = seed, image_size, start, length
        self.phantoms = phantoms

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([self.seed, self.start + index])
        if self.phantoms and rng.random() < PHANTOM_PART:
            image, targets = self.phantoms.draw(rng, self.image_size, PROMPTS_PER_SLICE)
            return image, targets, torch.tensor([self.image_size] * 2)
        image, targets, extent = generated_slice(rng, self.image_size, PROMPTS_PER_SLICE)
        return image, targets, torch.tensor(extent)


def batches(dataset: Dataset, batch: int, workers: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of (images, targets, extents), made beside the training when there is a worker."""
    return iter(DataLoader(dataset, batch, num_workers=workers, worker_init_fn=_one_thread))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def encode(model: SAMModel, images: torch.Tensor, extents: torch.Tensor) -> torch.Tensor:
    """Embeddings, with zeros after normalisation where a slice is padded, as at prediction."""
    x = model.preprocess(images)
    line = torch.arange(model.image_size)
    inside = (line[None, :, None] < extents[:, 0, None, None]) & (line[None, None] < extents[:, 1, None, None])
    return model.sam.image_encoder(x * inside[:, None])


def train(
    model: SAMModel,
    data: Generated,
    span: tuple[float, float],
    minutes: float,
    rate: float,
    out: Path,
    workers: int,
) -> int:
    """Train one phase for ``minutes`` of processor time, so that other jobs do not shorten it.

    ``span`` is its part of the whole schedule. Returns the slices used.
    """
    seed, start = data.seed, data.start
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + start)
    optimiser = torch.optim.AdamW(model.sam.parameters(), rate, weight_decay=0.01)
    begun, saved, step, used, shown = time.process_time(), time.monotonic(), 0, 0, []
    model.sam.train()
    for images, targets, extents in batches(data, BATCH, workers):
        part = (time.process_time() - begun) / 60 / minutes
        if part >= 1:
            break
        whole = span[0] + part * (span[1] - span[0])
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * whole)))
        with torch.autocast("cpu", torch.bfloat16, enabled=model.bf16):
            embeddings = encode(model, images, extents).repeat_interleave(PROMPTS_PER_SLICE, 0)
            kind = draw_kind(generator)
            rounds = CORRECTIONS.get(kind, 1)
            loss, dice = interaction_loss(
                model, embeddings, targets.flatten(0, 1), kind, generator, rounds, simulation=AS_CLICKED
            )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.sam.parameters(), 1.0)
        optimiser.step()
        step, used = step + 1, used + len(images)
        shown.append((float(loss.detach()), dice))
        if step % 50 == 0:
            means = np.mean(shown[-50:], 0)
            logger.info("%d px step %d part %.3f loss %.4f dice %.3f", model.image_size, step, whole, *means)
        if time.monotonic() - saved > 240:
            save(model, out)
            saved = time.monotonic()
    save(model, out)
    return used


def save(model: SAMModel, out: Path) -> None:
    """Half-precision weights with the metadata to rebuild them."""
    state = {k: v.half() for k, v in model.sam.state_dict().items()}
    save_weights(out, state, {**model.metadata, "labels": []})


@torch.no_grad()
def held_out_dice(model: SAMModel, seed: int, slices: int, picture: Path | None) -> dict[str, float]:
    """Mean Dice at low resolution on slices never trained on, by prompt."""
    model.sam.eval()
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, list[float]] = {}
    rows = []
    for images, targets, extents in batches(Generated(seed, model.image_size, HELD_OUT, slices), BATCH, 0):
        embeddings = encode(model, images, extents).repeat_interleave(PROMPTS_PER_SLICE, 0)
        mask = targets.flatten(0, 1) > 0.5
        scale = model.image_size / mask.shape[-1]
        faulty = first_prompts(mask, "faulty+box+point", scale, generator)
        scores.setdefault("the faulty mask itself", []).extend(dice_each(faulty.probability > 0.5, mask))
        asked = {
            "box": first_prompts(mask, "box", scale, generator, simulation=PromptSimulation(ellipses=1)),
            "point": first_prompts(mask, "point", scale, generator),
            "faulty box + mask": Prompts(
                faulty.points[:, :0], faulty.point_labels[:, :0], faulty.boxes, faulty.probability
            ),
            "faulty box + point + mask": faulty,
        }
        for name, prompts in asked.items():
            logits, iou = prompts.decode(model, embeddings)
            got = logits[torch.arange(len(iou)), iou.argmax(1)] > 0
            scores.setdefault(name, []).extend(dice_each(got, mask))
            rows.append((name, images, mask, got))
    if picture:
        draw(rows, picture)
    return {name: round(float(np.mean(values)), 4) for name, values in scores.items()}


def dice_each(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Dice of each of P pairs of bool masks (P, l, l)."""
    return ((2 * (a & b).sum((1, 2)) + 1) / (a.sum((1, 2)) + b.sum((1, 2)) + 1)).tolist()


def draw(rows: list, picture: Path) -> None:
    """A sheet: eight slices for each of four prompts, truth in red, answer in green."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(8, 8, figsize=(20, 20))
    for (name, images, mask, got), line in zip(rows[:8], axes, strict=True):
        for n, axis in enumerate(line):
            axis.imshow(images[n], cmap="gray", vmin=0, vmax=1)
            for drawn, colour in ((mask, "red"), (got, "lime")):
                axis.contour(np.kron(drawn[n * PROMPTS_PER_SLICE], np.ones((2, 2))), [0.5], colors=colour, linewidths=1)
            axis.set_axis_off()
            axis.set_title(name, fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=60)


def main(
    out: Path = Path("apps/aslseg/pretrained/sam_small.safetensors"),
    minutes: float = 50,
    seed: int = 2312,
    rate: float = 6e-4,
    schedule: str = "64:0.25,128:0.6,192:1",
    workers: int = 1,
    init: Path | None = None,
    begin: float = 0.0,
    phantoms: int = 40,
    picture: Path | None = None,
) -> None:
    """Train, measure on held-out slices and write the weights and their manifest."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    abdomens = Phantoms(seed, phantoms) if phantoms else None
    logger.info("%d slices of phantoms", len(abdomens.slices) if abdomens else 0)
    used, started, low = 0, time.process_time(), begin
    state = load_weights(init, "sam")[0] if init else build(SMALL).state_dict()
    for size, high in ((int(z), float(e)) for z, e in (phase.split(":") for phase in schedule.split(","))):
        if high <= low:
            continue
        architecture: Architecture = replace(SMALL, image_size=size)
        model = SAMModel(build(architecture), architecture)
        model.sam.load_state_dict({k: v.float() for k, v in resized(state, architecture).items()})
        data = Generated(seed, size, round(begin * 10**6) + used, 10**7, abdomens)
        used += train(model, data, (low, high), minutes * (high - low) / (1 - begin), rate, out, workers)
        state, low = model.sam.state_dict(), high
    measured = held_out_dice(model, seed, 200, picture)
    logger.info("held out: %s", measured)
    run = {
        "command": " ".join(["python scripts/pretrain_sam.py", *sys.argv[1:]]),
        "script_sha256": sha256(Path(__file__)),
        "seed": seed,
        "phantom_part": PHANTOM_PART if phantoms else 0,
        "steps": used // BATCH,
        "slices": used,
        "minutes": round((time.process_time() - started) / 60, 1),
    }
    write_manifest(out, [*(earlier_runs(init) if init else []), run], measured)


def earlier_runs(weights: Path) -> list[dict]:
    """The runs that made the weights this one started from, by the manifest beside them."""
    manifest = weights.with_name("manifest.json")
    return json.loads(manifest.read_text())[weights.name]["runs"] if manifest.exists() else []


def write_manifest(out: Path, runs: list[dict], measured: dict[str, float]) -> None:
    """The weights' entry in the ``manifest.json`` beside them: what they are and how they were made."""
    content = {
        "sha256": sha256(out),
        "bytes": out.stat().st_size,
        "parameters": read(out).parameters,
        "architecture": SMALL.to_metadata(),
        "licence": "Apache-2.0",
        "trained_on": "generated slices (sam.training.generated_slices), phantom CTs (volume.phantom), no scan",
        "runs": runs,
        "held_out_dice": measured,
    }
    path = out.with_name("manifest.json")
    others = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**others, out.name: content})


if __name__ == "__main__":
    typer.run(main)
