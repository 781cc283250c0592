"""Training patches of the second stage: rare classes in each batch, synthetic lesions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aslseg.cases.patches import Patch, PatchSampler, RareClassSampler
from aslseg.cases.prepared_case import Prepared, human_labelled
from aslseg.compute.augment import normal_noise
from aslseg.ssl.batches import Batches
from aslseg.ssl.synthetic_lesions import Lesions


def varied(image: Tensor, generator: torch.Generator) -> Tensor:
    """Relative intensities (B, 1, i, j, k) with other contrast, brightness and noise.

    Brightness changes little, since it is relative to the parent already.
    """
    u = torch.rand(len(image), 3, generator=generator).to(image.device)[:, :, None, None, None, None] * 2 - 1
    changed = 0.5 + (image - 0.5) * (1 + 0.25 * u[:, 0]) + 0.04 * u[:, 1]
    return changed + 0.03 * (u[:, 2] + 1) / 2 * normal_noise(image.shape, generator, image.device)


class NestedBatches(Batches):
    """Batches of the second stage; its first label is the parent."""

    network: Mapping[str, Any] = MappingProxyType({"last_relu": False})

    def sampler(self, labelled: Sequence[Prepared], patch: tuple[int, int, int]) -> PatchSampler:
        """Draws labelled patches, and learns what the lesions look like that people have labelled."""
        labels = self.settings.label_set
        human = human_labelled(labelled)
        self.lesions = Lesions(human, labels, self.settings.nested_synthetic)
        rare = [n + 1 for n, parent in enumerate(labels.parents) if parent is not None]
        return RareClassSampler(labelled, patch, len(labels), rare)

    def draw(self, rng: np.random.Generator, around: Sequence[int] = ()) -> list[Patch]:
        """The labelled patches of a batch, some of them with synthetic lesions."""
        return [self.lesions.into(patch, rng) for patch in super().draw(rng, around)]

    def strong(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """See :func:`varied`."""
        return varied(image, generator)
