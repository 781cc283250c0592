"""Schedules over the training, as functions of the fraction done (0..1), and the EMA of the teacher."""

from __future__ import annotations

import math

import torch
from torch import nn


def sigmoid_ramp(fraction: float) -> float:
    """exp(-5 (1 - t)^2), the ramp-up of the consistency weight (Laine & Aila; docs/science.md §4)."""
    t = min(max(fraction, 0.0), 1.0)
    return math.exp(-5 * (1 - t) ** 2)


def polynomial(fraction: float, power: float = 0.9) -> float:
    """(1 - t)^0.9, the learning-rate decay."""
    return max(1 - fraction, 0.0) ** power


def milestones(fraction: float) -> float:
    """1, then 0.1 from 5/12 and 0.01 from 5/6 of the training on: the papers' steps 2500 and 5000 of 6000."""
    return 0.1 ** ((fraction >= 5 / 12) + (fraction >= 5 / 6))


SCHEDULES = {"poly": polynomial, "milestones": milestones}


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, step: int, decay: float) -> None:
    """teacher = a teacher + (1 - a) student with a = min(1 - 1 / (step + 1), decay), parameters only.

    Batch-norm statistics are the teacher's own, from its passes in training mode (docs/science.md §4).
    """
    alpha = min(1 - 1 / (step + 1), decay)
    old: list[torch.Tensor] = list(teacher.parameters())
    new: list[torch.Tensor] = list(student.parameters())
    torch._foreach_lerp_(old, new, 1 - alpha)
