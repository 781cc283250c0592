from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from aslseg.sam.modeling.build import SAMModel, ellipses
from aslseg.sam.training.generated_slices import generated_slice
from aslseg.sam.training.simulated_prompts import (
    AS_CLICKED,
    KINDS,
    Prompts,
    PromptSimulation,
    boxes_of,
    corrected,
    corrupt,
    draw_kind,
    first_prompts,
    interaction_loss,
    mask_loss,
    random_pixels,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rectangles() -> torch.Tensor:
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, 4:10, 12:28] = True
    masks[1, :, :] = True
    masks[2, 20:22, 3:6] = True
    return masks


def test_boxes_are_tight_half_open_and_in_xy() -> None:
    assert boxes_of(rectangles(), 2).tolist() == [[24, 8, 56, 20], [0, 0, 64, 64], [6, 40, 12, 44]]


def test_random_pixels_lie_inside() -> None:
    masks = rectangles()
    points = random_pixels(masks, 50, 2, generator())
    cell = ((points + 0.5) / 2).floor().long()
    for n, mask in enumerate(masks):
        assert mask[cell[n, :, 1], cell[n, :, 0]].all()
    assert torch.isfinite(random_pixels(torch.zeros_like(masks), 2, 2, generator())).all()


def test_corruption_is_a_mediocre_segmentation() -> None:
    i, j = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    disc = ((i - 45) ** 2 + (j - 50) ** 2 < 20**2).expand(200, 96, 96)
    p = corrupt(disc, generator())
    assert p.min() >= 0
    assert p.max() <= 1
    got = p > 0.5
    dice = 2 * (got & disc).sum((1, 2)) / (got.sum((1, 2)) + disc.sum((1, 2)))
    assert 0.6 < dice.mean() < 0.95
    assert dice.std() > 0.05
    assert torch.equal(p, corrupt(disc, generator()))
    assert not torch.equal(p, corrupt(disc, generator(1)))


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_has_the_parts_it_names(kind: str) -> None:
    prompts = first_prompts(rectangles(), kind, 2, generator())
    assert (prompts.points.shape[1] > 0) == ("point" in kind)
    assert (prompts.boxes is not None) == ("box" in kind)
    assert (prompts.probability is not None) == ("faulty" in kind)


def test_given_faults_are_used_where_there_are_any() -> None:
    target = rectangles()
    faulty = torch.zeros(3, 32, 32)
    faulty[0, 6:14, 10:20] = 0.9
    prompts = first_prompts(target, "faulty+box", 2, generator(), faulty)
    made = first_prompts(target, "faulty+box", 2, generator())
    assert prompts.probability is not None
    assert prompts.boxes is not None
    assert made.probability is not None
    assert torch.equal(prompts.probability[0], faulty[0])
    assert torch.equal(prompts.probability[1:], made.probability[1:])
    assert prompts.boxes[0].tolist() == [17, 9, 43, 31]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Prompts, torch.Tensor]]:
    """All prompts that SAM gets, and the logits (P, l, l) of the answers that it believes in."""
    seen: list[tuple[Prompts, torch.Tensor]] = []
    decode = Prompts.decode

    def watch(self: Prompts, model: SAMModel, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, iou = decode(self, model, embeddings)
        seen.append((self, logits.detach()[torch.arange(len(iou)), iou.argmax(1)]))
        return logits, iou

    monkeypatch.setattr(Prompts, "decode", watch)
    return seen


def test_the_last_round_is_the_mask_alone(tiny: SAMModel, told: list[tuple[Prompts, torch.Tensor]]) -> None:
    image, targets, _ = generated_slice_64()
    embeddings = tiny.encode(image[None]).expand(4, -1, -1, -1)
    interaction_loss(tiny, embeddings, targets, "box", generator(), mask_alone=True)
    box, clicks, alone = (prompts for prompts, _ in told)
    assert (box.points.shape[1], box.boxes is None, box.probability is None) == (0, False, True)
    assert clicks.points.shape[1] >= 1
    assert clicks.probability is not None
    assert (alone.points.shape[1], alone.boxes) == (0, None)
    assert alone.probability is not None
    assert not torch.equal(alone.probability, clicks.probability)


@pytest.mark.parametrize("kind", ["point", "box"])
def test_answers_are_refined_with_their_own_box_or_the_given_one(
    kind: str, tiny: SAMModel, told: list[tuple[Prompts, torch.Tensor]]
) -> None:
    image, targets, _ = generated_slice_64()
    embeddings = tiny.encode(image[None]).expand(4, -1, -1, -1)
    interaction_loss(tiny, embeddings, targets, kind, generator(), 2, refine=True, mask_alone=True)
    first, once, twice, refined, alone = (prompts for prompts, _ in told)
    assert first.points.shape[1] < once.points.shape[1] < twice.points.shape[1] == refined.points.shape[1]
    for (_, before), prompts in zip(told[:-1], (once, twice, refined, alone), strict=True):
        assert torch.allclose(prompts.probability, torch.sigmoid(before), atol=1e-6)
    own = boxes_of(told[2][1] > 0, tiny.image_size / targets.shape[-1]) + torch.tensor([-3.0, -3.0, 3.0, 3.0])
    assert torch.equal(refined.boxes, first.boxes if kind == "box" else own)
    assert (alone.points.shape[1], alone.boxes) == (0, None)


def test_kinds_come_up_by_their_weight() -> None:
    source = generator()
    drawn = [draw_kind(source, {"a": 0.9, "b": 0.1}) for _ in range(200)]
    assert 150 < drawn.count("a") < 200


def test_corrections_click_on_the_error_with_the_right_sign() -> None:
    target = rectangles()[:1]
    answer = torch.zeros(1, 32, 32)
    answer[0, 4:10, 12:20] = 1  # the right half is missing
    answer[0, 25:30, 2:8] = 1  # and this is wrong
    first = Prompts(torch.zeros(1, 0, 2), torch.zeros(1, 0), boxes_of(target, 2))
    seen = set()
    for seed in range(20):
        nextone = corrected(first, answer, target, 2, generator(seed))
        assert nextone.boxes is first.boxes
        assert nextone.probability is answer
        for (x, y), label in zip(nextone.points[0].tolist(), nextone.point_labels[0].tolist(), strict=True):
            seen.add(label)
            assert (40 <= x < 56 and 8 <= y < 20) if label == 1 else (4 <= x < 16 and 50 <= y < 60)
    assert seen == {0.0, 1.0}


def test_some_boxes_bring_their_ellipse() -> None:
    target, brought = rectangles(), []
    for seed in range(40):
        prompts = first_prompts(target, "box", 2, generator(seed), simulation=PromptSimulation(ellipses=0.5))
        brought.append(prompts.probability is not None)
        if prompts.probability is not None:
            assert torch.equal(prompts.probability, ellipses(prompts.boxes, 32, 2))
    assert 8 < sum(brought) < 32
    assert first_prompts(target, "box", 2, generator()).probability is None


def test_an_annotator_clicks_once_deepest_in_the_largest_error() -> None:
    target = rectangles()
    answer = target.float()
    answer[0, 4:10, 20:28] = 0  # 48 pixels are missing, and 30 others wrong
    answer[0, 25:30, 2:8] = 1
    first = Prompts(torch.zeros(3, 0, 2), torch.zeros(3, 0), boxes_of(target, 2))
    asked = corrected(first, answer, target, 2, generator(), PromptSimulation(deepest=1))
    assert asked.points.shape == (3, 1, 2)
    (x, y), label = asked.points[0, 0].tolist(), float(asked.point_labels[0, 0])
    assert (label, 44 <= x < 52, 12 <= y < 16) == (1, True, True)
    assert torch.isfinite(asked.points).all(), "an answer without errors is clicked somewhere"


def test_the_next_mask_prompt_obeys_the_clicks(tiny: SAMModel, told: list[tuple[Prompts, torch.Tensor]]) -> None:
    image, targets, _ = generated_slice_64()
    embeddings = tiny.encode(image[None]).expand(4, -1, -1, -1)
    interaction_loss(tiny, embeddings, targets, "point", generator(), 3, simulation=AS_CLICKED)
    contradicted = 0
    for (prompts, logits), (then, _) in pairwise(told):
        cells = (prompts.points / 2).long()
        for n, (answer, masked) in enumerate(zip(logits > 0, then.probability >= 0.5, strict=True)):
            x, y, label = cells[n, -1, 0], cells[n, -1, 1], bool(prompts.point_labels[n, -1])
            contradicted += bool(answer.any()) and bool(answer[y, x]) != label
            assert not answer.any() or bool(masked[y, x]) == label
    assert contradicted


def test_loss_of_hand_made_masks() -> None:
    target = rectangles()[:1].float()
    perfect = (target * 2 - 1)[:, None] * 20
    right = torch.ones(1, 1)
    assert mask_loss(perfect, right, target) < 1e-3
    assert mask_loss(-perfect, torch.zeros(1, 1), target) > 1
    wrong_iou = mask_loss(perfect, torch.zeros(1, 1), target)
    assert wrong_iou == pytest.approx(1, abs=1e-3)
    # focal: 20 * mean(alpha * (y - p)^2 * bce), dice with smoothing 1, at p = 0.5 everywhere
    n, inside = target.numel(), float(target.sum())
    alpha = (0.25 * inside + 0.75 * (n - inside)) / n
    expected = 20 * alpha * 0.25 * 0.6931 + 1 - (inside + 1) / (n / 2 + inside + 1)
    assert mask_loss(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1), target) == pytest.approx(expected, rel=1e-3)


def test_only_the_best_of_three_masks_is_trained() -> None:
    target = rectangles()[:1].float()
    good = (target * 2 - 1)[:, None] * 20
    logits = torch.cat([-good, good, -good], 1).requires_grad_()
    mask_loss(logits, torch.tensor([[0.0, 1.0, 0.0]]), target).backward()
    assert logits.grad is not None
    assert not logits.grad[:, [0, 2]].any()


@pytest.mark.parametrize("kind", list(KINDS))
def test_interaction_trains_the_parts_it_uses(kind: str, tiny: SAMModel) -> None:
    image, targets, _ = generated_slice_64()
    tiny.sam.train()
    embeddings = tiny.encode(image[None]).expand(4, -1, -1, -1)
    loss, dice = interaction_loss(tiny, embeddings, targets, kind, generator())
    loss.backward()
    assert torch.isfinite(loss)
    assert 0 <= dice <= 1
    for part in (tiny.sam.image_encoder, tiny.sam.prompt_encoder, tiny.sam.mask_decoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def generated_slice_64() -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    import numpy as np

    return generated_slice(np.random.default_rng(3), 64, 4)


def test_generated_slices_are_reproducible_and_sound() -> None:
    import numpy as np

    sizes, padded = [], 0
    for seed in range(30):
        image, targets, (rows, columns) = generated_slice(np.random.default_rng(seed), 64, 4)
        again, _, _ = generated_slice(np.random.default_rng(seed), 64, 4)
        assert torch.equal(image, again)
        assert image.shape == (64, 64)
        assert targets.shape == (4, 32, 32)
        assert image.min() >= 0
        assert image.max() <= 1
        assert not image[rows:].any()
        assert not image[:, columns:].any()
        outside = F.pad(torch.zeros(rows // 2, columns // 2), (0, 32 - columns // 2, 0, 32 - rows // 2), value=1)
        assert (targets * outside.bool()).sum() <= 64  # at most the half pixels along the edge
        assert ((targets > 0.5).sum((1, 2)) >= 4).all()
        sizes += ((targets > 0.5).float().mean((1, 2))).tolist()
        padded += min(rows, columns) < 64
    assert 5 < padded < 25
    assert min(sizes) < 0.02
    assert max(sizes) > 0.2
