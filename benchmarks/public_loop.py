"""A training step of SSL methods as their public code does it, to measure ours against (bench_ssl.py).

Float32, the default memory format, batches from a DataLoader; written from the equations of docs/science.md §4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aslseg.compute.augment import centre
from aslseg.compute.device import choose_device
from aslseg.registry import NETWORKS
from aslseg.settings import Settings

EPSILON = 1e-5
METHODS = ("supervised", "mean_teacher", "bcp")


class PublicPatches(Dataset):
    """Random crop, rot90 in plane, flip along i or j (UA-MT's dataset and everything after it), on the CPU."""

    def __init__(self, streams: tuple[list, list], batch: tuple[int, int], patch: tuple[int, ...]) -> None:
        self.streams, self.batch, self.patch = streams, batch, patch

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(index)
        cases = self.streams[index % sum(self.batch) >= self.batch[0]]
        case = cases[int(rng.integers(len(cases)))]
        image, label = case.image, np.zeros(case.image.shape, np.uint8) if case.label is None else case.label
        start = [int(rng.integers(0, n - p + 1)) for n, p in zip(image.shape, self.patch, strict=True)]
        window = tuple(slice(s, s + p) for s, p in zip(start, self.patch, strict=True))
        image, label = image[window], label[window]
        # a quarter turn needs a square patch; others are turned by half
        turn = int(rng.integers(4)) if self.patch[0] == self.patch[1] else 2 * int(rng.integers(2))
        axis = int(rng.integers(2))
        image, label = (np.flip(np.rot90(a, turn), axis).copy() for a in (image, label))
        return torch.from_numpy(centre(image))[None], torch.from_numpy(label.astype(np.int64))


class PublicLoop:
    """A training step as the public code of a method does it (docs/science.md §4)."""

    def __init__(
        self, method: str, cases: tuple[list, list], settings: Settings, patch: tuple[int, ...], workers: int
    ) -> None:
        self.method, self.device = method, choose_device(settings)
        classes = len(settings.label_set) + 1
        torch.manual_seed(0)
        self.student = NETWORKS.get(settings.network)(classes, patch).to(self.device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimiser = torch.optim.SGD(self.student.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        # BCP mixes pairs of its batch: twice the patches are drawn for as many to learn from
        pairs = 2 if method == "bcp" else 1
        unlabelled = 0 if method == "supervised" else settings.batch_unlabelled
        self.labelled = pairs * settings.batch_labelled
        batch = (self.labelled, pairs * unlabelled)
        self.drawn = sum(batch)
        loader = DataLoader(
            PublicPatches(cases, batch, patch),
            batch_size=sum(batch),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        self.batches: Iterator[list[Tensor]] = iter(loader)

    def __call__(self, step: int) -> float:
        image, label = (t.to(self.device) for t in next(self.batches))
        loss = getattr(self, f"_{self.method}")(image, label[: self.labelled])
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if self.method != "supervised":
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.data.mul_(0.99).add_(new.data, alpha=0.01)
        return loss.item()

    def _supervised(self, image: Tensor, label: Tensor) -> Tensor:
        return _public_loss(self.student(image)[: len(label)], label)

    def _mean_teacher(self, image: Tensor, label: Tensor) -> Tensor:
        free = image[len(label) :]
        logits = self.student(image)
        with torch.no_grad():
            target = self.teacher(free + torch.clamp(torch.randn_like(free) * 0.1, -0.2, 0.2))
        apart = (logits[len(label) :].softmax(1) - target.softmax(1)).square().mean()
        return _public_loss(logits[: len(label)], label) + 0.1 * apart

    def _bcp(self, image: Tensor, label: Tensor) -> Tensor:
        free = image[len(label) :]
        (image_a, image_b), (free_a, free_b), (label_a, label_b) = (
            t.chunk(2) for t in (image[: len(label)], free, label)
        )
        with torch.no_grad():
            pseudo_a, pseudo_b = (_largest(self.teacher(u).argmax(1)) for u in (free_a, free_b))
        mask = torch.ones(image.shape[2:], device=self.device)
        edges = [2 * n // 3 for n in mask.shape]
        corner = [int(np.random.randint(n - e)) for n, e in zip(mask.shape, edges, strict=True)]
        mask[tuple(slice(c, c + e) for c, e in zip(corner, edges, strict=True))] = 0
        mixed_in = self.student(free_a * mask + image_a * (1 - mask))
        mixed_out = self.student(image_b * mask + free_b * (1 - mask))
        inwards = _public_loss(mixed_in, label_a, 1 - mask) + 0.5 * _public_loss(mixed_in, pseudo_a, mask)
        return inwards + _public_loss(mixed_out, label_b, mask) + 0.5 * _public_loss(mixed_out, pseudo_b, 1 - mask)


def _public_loss(logits: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half cross-entropy, half Dice, each foreground class in turn."""
    where = torch.ones_like(label, dtype=logits.dtype) if mask is None else mask.expand(label.shape)
    entropy = (F.cross_entropy(logits, label, reduction="none") * where).sum() / (where.sum() + 1e-16)
    p, apart = logits.softmax(1), []
    for value in range(1, logits.shape[1]):
        truth, score = (label == value).float() * where, p[:, value] * where
        apart.append(1 - (2 * (score * truth).sum() + EPSILON) / ((score**2).sum() + (truth**2).sum() + EPSILON))
    return 0.5 * (entropy + sum(apart) / len(apart))


def _largest(maps: Tensor) -> Tensor:
    out = []
    for case in maps.cpu().numpy():
        components, count = ndimage.label(case > 0, np.ones((3, 3, 3)))
        out.append(case * (components == np.bincount(components.flat)[1:].argmax() + 1) if count else case)
    return torch.from_numpy(np.stack(out)).to(maps.device)
