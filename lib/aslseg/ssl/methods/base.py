"""What an SSL method is: a few networks, the loss of a step, and the network that predicts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aslseg.settings import Settings

Logs = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """Patches of one step.

    Attributes:
        image: Labelled patches (B, 1, i, j, k), zero-centred.
        target: Their class maps (B, i, j, k), int64.
        weight: Their voxel weights (B, i, j, k).
        unlabelled: Unlabelled patches (U, 1, i, j, k); U may be 0.
    """

    image: Tensor
    target: Tensor
    weight: Tensor
    unlabelled: Tensor


class Method(nn.Module, ABC):
    """Base of the plug-ins. Sub-modules are the method's state and are checkpointed with it.

    Args:
        network: ``network(extra)`` makes a freshly initialised network with ``extra`` outputs after the classes' own.
        settings: Weights and decays.

    Attributes:
        extra_outputs: Outputs of the published network after the classes' own; prediction drops them.
    """

    extra_outputs = 0

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.student = network(self.extra_outputs)

    @abstractmethod
    def loss(self, batch: Batch, part: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """Loss of one step.

        Args:
            batch: The step's patches.
            part: Part of the training done, 0..1.
            generator: The step's own source of randomness.
        """

    def after_step(self, step: int, part: float) -> None:
        """Called once the optimiser has stepped; ``step`` counts from 0."""

    @property
    def predictor(self) -> nn.Module:
        """The network to publish."""
        return self.student

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Warm start: load published weights into every network of the method."""
        for network in self.children():
            network.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the predicting network."""
        return self.predictor(x)


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy that no gradient reaches. It stays in training mode, as the SSL papers have it."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher
