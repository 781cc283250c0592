"""Base of the SSL methods: their networks, the loss of a step, and the network that predicts.

A new method is a file in this folder and a line in ``SSL_METHODS`` of :mod:`aslseg.registry`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aslseg.compute.losses import merge_unknown
from aslseg.compute.schedules import sigmoid_ramp
from aslseg.errors import BadWeightsError
from aslseg.settings import Settings

Logs = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """Patches of one step.

    Attributes:
        image: Labelled patches (B, 1, i, j, k), with about zero mean and unit variance.
        target: Their class maps (B, i, j, k), int64; a value above N leaves open which of the labels nested in another
            one a voxel is of (:meth:`Method.merged`).
        weight: Their voxel weights (B, i, j, k).
        unlabelled: Unlabelled patches (U, 1, i, j, k); U may be 0.
        weak: The same patches before their intensities were changed.
    """

    image: Tensor
    target: Tensor
    weight: Tensor
    unlabelled: Tensor
    weak: Tensor


class Method(nn.Module, ABC):
    """Base of the plug-ins. Sub-modules are the method's state and are checkpointed with it.

    Args:
        network: ``network(extra)`` makes a freshly initialised network with ``extra`` outputs after the classes' own.
        settings: Weights and decays.

    Attributes:
        published_consistency: Largest weight of the unlabelled loss in the method's paper; None where no setting
            changes it.
        labelled_fraction: Fraction of the training before the unlabelled patches are used.
        warm: Whether training started from a trained model, which needs no such phase.
    """

    published_consistency: float | None = 0.1
    labelled_fraction = 0.0
    warm: Tensor

    def __init__(self, network: Callable[..., nn.Module], settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.student = network(self.extra_outputs)
        self.register_buffer("warm", torch.tensor(False))

    @property
    def extra_outputs(self) -> int:
        """Outputs of the published network after the classes' own; prediction drops them."""
        return 0

    def consistency_weight(self, fraction: float) -> float:
        """lambda(t): the setting ``consistency`` or the published weight, times exp(-5 (1 - t)^2); 0 without one."""
        if self.published_consistency is None:
            return 0.0
        chosen = self.settings.consistency
        return (self.published_consistency if chosen == "auto" else chosen) * sigmoid_ramp(fraction)

    def semi_supervised_fraction(self, fraction: float) -> float:
        """Fraction done of the phase with unlabelled patches, at ``fraction`` of the training; below 0 before it."""
        before = 0.0 if self.warm else self.labelled_fraction
        return (fraction - before) / (1 - before)

    def merged(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C, i, j, k) of the classes and a target (B, i, j, k) as losses take them, with values 0..N.

        Every supervised loss goes through this: :attr:`Batch.target` may leave nested labels open.
        """
        return merge_unknown(logits, target, self.settings.label_set)

    @abstractmethod
    def loss(self, batch: Batch, fraction: float, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """Loss of one step.

        Args:
            batch: The step's patches.
            fraction: Of the training that is done, 0..1.
            generator: The step's own source of random numbers (CPU).

        Returns:
            The loss, a scalar, and numbers for the log; ``foreground`` must be among them.
        """

    def after_step(self, step: int, fraction: float) -> None:
        """Called once the optimiser has stepped; ``step`` counts from 0."""

    @property
    def predictor(self) -> nn.Module:
        """The network to publish."""
        return self.student

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Warm start: load published weights into every network of the method.

        Raises:
            BadWeightsError: They belong to another network, or to a method with other outputs.
        """
        for network in self.children():
            load_published(network, state, self.settings)
        self.warm.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the predicting network."""
        return self.predictor(x)


def load_published(network: nn.Module, state: dict[str, Tensor], settings: Settings) -> None:
    """Load published weights into one network.

    Raises:
        BadWeightsError: They do not fit.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise BadWeightsError(
            f"the model to start from does not fit network = {settings.network} as ssl_method = {settings.ssl_method} "
            f"builds it ({len(reasons)} differences; {' '.join(reasons)[:200]}); start from a model of the same "
            "network and method, or without one"
        ) from None


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy that no gradient reaches, in training mode as in the SSL papers."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher
