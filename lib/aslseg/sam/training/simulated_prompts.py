"""What SAM is trained on: simulated prompts and the loss, for pre-training and fine-tuning alike.

Everything happens on low-res maps (4 x grid); prompts come out in the input frame. The order of prompts follows
SAM-Med2D (arXiv 2308.16184, section 3): first a box, a point or a faulty mask, then clicks drawn from the error of
the previous answer, with that answer as mask prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from aslseg.compute.random_field import smooth_field
from aslseg.prompts.corrections import enforce_clicks
from aslseg.prompts.from_mask import EIGHT_NEIGHBOURS
from aslseg.sam.modeling.build import SAMModel, ellipses

# First prompts and how often each is drawn. The parts of "faulty+" prompts are made from one
# corrupted mask, as those from the SSL model are.
KINDS = {"box": 0.3, "point": 0.3, "faulty+box+point": 0.2, "faulty+box": 0.1, "faulty": 0.1}
CORRECTIONS = {"point": 2}  # rounds of clicks in pre-training, else one


@dataclass(frozen=True)
class PromptSimulation:
    """How far simulated prompts resemble those of the click models (:class:`aslseg.sam.clicks.passes.PassRunner`).

    Attributes:
        ellipses: Fraction of the boxes that have the ellipse in them as mask prompt.
        deepest: Fraction of the rounds of clicks that are one click deepest in the largest error, as annotators click;
            the others are one to three clicks anywhere in the error.
        enforce_clicks: Whether clicks are enforced on the mask prompt of the next round.
    """

    ellipses: float = 0.0
    deepest: float = 0.0
    enforce_clicks: bool = False


PLAIN = PromptSimulation()
AS_CLICKED = PromptSimulation(ellipses=0.75, deepest=0.5, enforce_clicks=True)


@dataclass(frozen=True)
class Prompts:
    """P simultaneous prompts in the input frame, see :meth:`aslseg.sam.modeling.build.SAMModel.decode`.

    Attributes:
        points: (P, n, 2) as (x, y), n may be 0.
        point_labels: (P, n).
        boxes: (P, 4) or None.
        probability: Low-res probabilities (P, l, l) or None.
    """

    points: Tensor
    point_labels: Tensor
    boxes: Tensor | None = None
    probability: Tensor | None = None

    @property
    def ambiguous(self) -> bool:
        """A single point, which most SAMs answer with three masks."""
        return self.points.shape[1] == 1 and self.boxes is None and self.probability is None

    def decode(self, model: SAMModel, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The answer of the model: low-res logits (P, M, l, l) and predicted IoU (P, M)."""
        return model.decode(
            embeddings,
            points=(self.points, self.point_labels) if self.points.shape[1] else None,
            boxes=self.boxes,
            masks=None if self.probability is None else model.mask_prompt(self.probability),
            multimask=model.conventions.use_multimask(self.ambiguous),
        )


def boxes_of(masks: Tensor, scale: float) -> Tensor:
    """Tight boxes of bool masks (P, l, l): (P, 4) as x0, y0, x1, y1 times ``scale``, the far side exclusive."""
    size = masks.shape[-1]
    sides = []
    for axis in (1, 2):  # over rows: extent in x; over columns: extent in y
        line = masks.any(axis)
        first = line.float().argmax(1)
        last = size - line.flip(1).float().argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).float() * scale


def dilated_boxes(masks: Tensor, scale: float) -> Tensor:
    """Boxes (P, 4) of bool masks (P, l, l), widened by 3 pixels of the input frame as those of prompts from masks."""
    return boxes_of(masks, scale) + torch.tensor([-3.0, -3.0, 3.0, 3.0])


def random_pixels(masks: Tensor, count: int, scale: float, generator: torch.Generator) -> Tensor:
    """``count`` random pixels of bool masks (P, l, l): (P, count, 2) as (x, y); anywhere where a mask is empty."""
    size = masks.shape[-1]
    weights = masks.flatten(1).float()
    weights = weights + (weights.sum(1, keepdim=True) == 0)
    index = torch.multinomial(weights, count, replacement=True, generator=generator)
    return (torch.stack([index % size, index // size], -1).float() + 0.5) * scale - 0.5


def noise_field(count: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth random fields (count, size, size) with about unit variance, ``cells`` bumps across."""
    return smooth_field(torch.randn(count, cells, cells, generator=generator), size)


def corrupt(target: Tensor, generator: torch.Generator) -> Tensor:
    """Probabilities with the errors of a segmentation network.

    The errors are warped borders, over- and under-segmentation, missing parts, holes, false parts and blur.

    Args:
        target: Bool masks (P, l, l).
        generator: Source of all random numbers.

    Returns:
        float32 (P, l, l) in 0..1.
    """
    count, size = target.shape[0], target.shape[-1]

    def chance(p: float) -> Tensor:
        return (torch.rand(count, 1, 1, generator=generator) < p).float()

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    box = boxes_of(target, 2 / size)
    centre = (box[:, :2] + box[:, 2:]) / 2 - 1
    extent = ((box[:, 2:] - box[:, :2]).mean(1) / 2).view(-1, 1, 1)
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)
    zoom = uniform(0.8, 1.3)  # above 1 the copy shrinks
    rough = uniform(0, 0.2) * extent
    axes = []
    for axis, base in enumerate((line.view(1, 1, -1), line.view(1, -1, 1))):
        middle = centre[:, axis].view(-1, 1, 1)
        shift = uniform(-0.12, 0.12) * extent
        axes.append((base - middle) * zoom + middle + shift + rough * noise_field(count, size, 9, generator))
    p = F.grid_sample(target[:, None].float(), torch.stack(axes, -1), align_corners=False)[:, 0]
    angle = uniform(0, 6.2832)
    offset = torch.cos(angle) * (line.view(1, 1, -1) - centre[:, 0].view(-1, 1, 1))
    offset = offset + torch.sin(angle) * (line.view(1, -1, 1) - centre[:, 1].view(-1, 1, 1))
    p = p * (1 - chance(0.2) * (offset > uniform(0.2, 0.7) * extent).float())
    p = p * (1 - chance(0.2) * (noise_field(count, size, 12, generator) > uniform(0.6, 1.6)).float())
    false = (noise_field(count, size, 8, generator) > uniform(1.2, 2.2)).float() * chance(0.35)
    near = F.max_pool2d(target[:, None].float(), 15, 1, 7)[:, 0]
    p = torch.maximum(p, false * near)
    soft = F.avg_pool2d(p[:, None], 5, 1, 2, count_include_pad=False)[:, 0]
    p = torch.where(chance(0.6) > 0, soft, p)
    return (p * uniform(0.75, 1.0) + 0.04 * noise_field(count, size, 16, generator)).clamp(0, 1)


def first_prompts(
    target: Tensor,
    kind: str,
    scale: float,
    generator: torch.Generator,
    faulty: Tensor | None = None,
    simulation: PromptSimulation = PLAIN,
) -> Prompts:
    """Prompts of one kind.

    Args:
        target: Bool masks (P, l, l).
        kind: One of :data:`KINDS`.
        scale: Input-frame pixels per low-res pixel.
        generator: Source of all random numbers.
        faulty: Probabilities (P, l, l) to make ``faulty`` prompts from; where one of them reaches 0.5 nowhere, and
            without them, :func:`corrupt` makes them.
        simulation: How often boxes have their ellipse as mask prompt.
    """
    count = target.shape[0]
    none = torch.zeros(count, 0, 2), torch.zeros(count, 0)
    if kind == "point":
        # mostly a single one: annotators begin with it, and it is the only prompt with three answers
        n = max(1, int(torch.randint(-2, 4, (1,), generator=generator)))
        return Prompts(random_pixels(target, n, scale, generator), torch.ones(count, n))
    if kind == "box":
        tight = boxes_of(target, scale)
        edge = (tight[:, 2:] - tight[:, :2]).repeat(1, 2)
        care = torch.rand(count, 1, generator=generator)  # annotators draw boxes more or less tightly
        jitter = torch.randn(count, 4, generator=generator) * care * (0.1 * edge).clamp(0.5, 10)
        drawn = tight + jitter
        if simulation.ellipses and torch.rand(1, generator=generator) < simulation.ellipses:
            return Prompts(*none, boxes=drawn, probability=ellipses(drawn, target.shape[-1], scale))
        return Prompts(*none, boxes=drawn)
    probability = corrupt(target, generator)
    if faulty is not None:
        probability = torch.where((faulty > 0.5).any(-1).any(-1)[:, None, None], faulty, probability)
    mask = probability > 0.5
    mask = torch.where(mask.any(-1).any(-1)[:, None, None], mask, target)
    points = (random_pixels(mask, 1, scale, generator), torch.ones(count, 1)) if "point" in kind else none
    boxes = dilated_boxes(mask, scale) if "box" in kind else None
    return Prompts(*points, boxes=boxes, probability=probability)


def corrected(
    prompts: Prompts,
    answer: Tensor,
    target: Tensor,
    scale: float,
    generator: torch.Generator,
    simulation: PromptSimulation = PLAIN,
) -> Prompts:
    """The next prompts: one to three clicks on the error of ``answer`` (P, l, l) probabilities, and that answer."""
    error = (answer > 0.5) != target
    if simulation.deepest and torch.rand(1, generator=generator) < simulation.deepest:
        error, n = torch.from_numpy(np.stack([_deepest(one) for one in error.numpy()])), 1
    else:
        n = int(torch.randint(1, 4, (1,), generator=generator))
    clicks = random_pixels(error, n, scale, generator)
    cell = (clicks / scale).long().clamp(0, target.shape[-1] - 1)
    rows = torch.arange(target.shape[0])[:, None]
    labels = target[rows, cell[..., 1], cell[..., 0]].float()
    return Prompts(
        torch.cat([prompts.points, clicks], 1),
        torch.cat([prompts.point_labels, labels], 1),
        prompts.boxes,
        answer,
    )


def _deepest(error: np.ndarray) -> np.ndarray:
    """The pixel deepest in the largest component of an error (l, l), bool; empty for an empty error."""
    parts, count = ndimage.label(error, EIGHT_NEIGHBOURS)
    out = np.zeros_like(error)
    if count:
        largest = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
        out.flat[ndimage.distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1].argmax()] = True
    return out


def _with_clicks_enforced(answer: Tensor, prompts: Prompts, scale: float) -> Tensor:
    """Probabilities (P, l, l) with the clicks of the prompts enforced."""
    points, labels = (prompts.points / scale).numpy(), prompts.point_labels.numpy()
    return torch.stack(
        [torch.from_numpy(enforce_clicks(*one)) for one in zip(answer.numpy(), points, labels, strict=True)]
    )


def mask_loss(logits: Tensor, predicted_iou: Tensor, target: Tensor) -> Tensor:
    """20 focal + Dice + squared error of the predicted IoU (SAM, section A; SAM-Med2D, section 3.2).

    Of three masks only the best one is trained; all of them learn to predict their IoU.

    Args:
        logits: (P, M, l, l).
        predicted_iou: (P, M).
        target: (P, l, l) in 0..1; border pixels may lie between.

    Returns:
        Scalar.
    """
    y = target[:, None].expand_as(logits)
    p = torch.sigmoid(logits)
    focal = (0.25 * y + 0.75 * (1 - y)) * (y - p) ** 2
    focal = (focal * F.binary_cross_entropy_with_logits(logits, y, reduction="none")).mean((2, 3))
    dice = 1 - (2 * (p * y).sum((2, 3)) + 1) / (p.sum((2, 3)) + y.sum((2, 3)) + 1)
    with torch.no_grad():
        got, true = p > 0.5, y > 0.5
        iou = (got & true).sum((2, 3)) / (got | true).sum((2, 3)).clamp(min=1)
    return ((20 * focal + dice).min(1).values + ((predicted_iou - iou) ** 2).mean(1)).mean()


def interaction_loss(
    model: SAMModel,
    embeddings: Tensor,
    target: Tensor,
    kind: str,
    generator: torch.Generator,
    corrections: int = 1,
    faulty: Tensor | None = None,
    refine: bool = False,
    mask_alone: bool = False,
    simulation: PromptSimulation = PLAIN,
) -> tuple[Tensor, float]:
    """Loss over a first prompt and ``corrections`` rounds of clicks, and the mean Dice of the last answer.

    SAM-Med2D takes an optimiser step after each answer and encodes once; here the losses of one image are added up. The
    mask prompt of later rounds is the answer before, as in :mod:`aslseg.sam.clicks.passes`.

    Args:
        model: SAM in training.
        embeddings: (P, C, grid, grid), one per prompt.
        target: (P, l, l) in 0..1.
        kind: One of :data:`KINDS`.
        generator: CPU generator of the prompts.
        corrections: Rounds of correction clicks.
        faulty: As for :func:`first_prompts`.
        refine: After the clicks, a round with the answer as mask and the box around it (or the given box), as objects
            grow from slice to slice.
        mask_alone: End with a round that is prompted with the previous answer and nothing else.
        simulation: How far prompts resemble those of the click models.
    """
    scale = model.image_size / target.shape[-1]
    mask = target.cpu() > 0.5
    prompts = first_prompts(mask, kind, scale, generator, faulty, simulation)
    rounds = 1 + corrections + refine + mask_alone
    total = embeddings.new_zeros((), dtype=torch.float32)
    for step in range(rounds):
        logits, iou = _moved(prompts, model.device).decode(model, embeddings)
        logits = logits.float()
        total = total + mask_loss(logits, iou.float(), target)
        best = iou.float().argmax(1)
        answer = torch.sigmoid(logits.detach()[torch.arange(len(best)), best]).cpu()
        got = answer > 0.5
        if simulation.enforce_clicks:
            answer = _with_clicks_enforced(answer, prompts, scale)
        if step < corrections:
            prompts = corrected(prompts, answer, mask, scale, generator, simulation)
        elif refine and step == corrections:
            boxes = dilated_boxes(answer > 0.5, scale) if prompts.boxes is None else prompts.boxes
            prompts = replace(prompts, boxes=boxes, probability=answer)
        else:
            prompts = Prompts(prompts.points[:, :0], prompts.point_labels[:, :0], probability=answer)
    dice = (2 * (got & mask).sum((1, 2)) + 1) / (got.sum((1, 2)) + mask.sum((1, 2)) + 1)
    return total / rounds, float(dice.mean())


def draw_kind(generator: torch.Generator, kinds: dict[str, float] | None = None) -> str:
    """A first prompt's kind, by its weight."""
    chosen = kinds or KINDS
    index = torch.multinomial(torch.tensor(list(chosen.values())), 1, generator=generator)
    return list(chosen)[int(index)]


def _moved(prompts: Prompts, device: torch.device) -> Prompts:
    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return Prompts(
        prompts.points.to(device), prompts.point_labels.to(device), to(prompts.boxes), to(prompts.probability)
    )
