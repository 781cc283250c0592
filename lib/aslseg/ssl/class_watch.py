"""Whether each class is being learned: its mean probability on its own voxels against that elsewhere.

The loss does not show it: a class of few voxels hardly moves the cross-entropy, and its Dice term stays near 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from aslseg.ssl.methods.base import Batch

logger = logging.getLogger(__name__)

# least mean probability on a class's own voxels, and least factor between that and its mean probability elsewhere
LEAST_OWN, LEAST_FACTOR = 0.2, 2.0

# name to [mean probability on the class's voxels, elsewhere]; None where no voxel was seen
Probabilities = dict[str, list[float | None]]


@torch.no_grad()
def class_probabilities(network: nn.Module, batches: Iterable[Batch], names: Sequence[str]) -> Probabilities:
    """Mean probability of each class on its own voxels and elsewhere, over the labelled patches of some batches.

    The network is looked at in evaluation mode and left as it was.
    """
    sums = np.zeros((len(names), 2, 2))
    training = network.training
    network.eval()
    for batch in batches:
        p = network(batch.image)[:, : len(names) + 1].float().softmax(1)
        for n in range(len(names)):
            own = batch.target == n + 1
            for side, where in enumerate((own, ~own & (batch.weight > 0) & (batch.target <= len(names)))):
                sums[n, side] += [p[:, n + 1][where].sum().item(), where.sum().item()]
    network.train(training)
    return {
        name: [float(total / count) if count else None for total, count in row]
        for name, row in zip(names, sums, strict=True)
    }


def not_learned(classes: Mapping[str, Sequence[float | None]]) -> list[str]:
    """The classes that a network does not find on their own voxels, or finds nearly as much elsewhere."""
    return [
        name
        for name, (own, elsewhere) in classes.items()
        if own is not None and own < max(LEAST_OWN, LEAST_FACTOR * (elsewhere or 0))
    ]


def warnings_of(classes: Mapping[str, Sequence[float | None]]) -> list[str]:
    """A line for people for each class that is not learned."""
    return [
        f"{name} is not learned: its mean probability is {classes[name][0]:.3f} on its own voxels and "
        f"{classes[name][1] or 0:.3f} elsewhere; label more scans that show it, or train longer (ssl_iterations)"
        for name in not_learned(classes)
    ]


def described(classes: Mapping[str, Sequence[float | None]]) -> str:
    """The end of a line of the log."""
    shown = [
        f"; {name} {'-' if own is None else f'{own:.2f}'} on its voxels, {elsewhere or 0:.3f} elsewhere"
        for name, (own, elsewhere) in classes.items()
    ]
    return "".join(shown)
