"""Training patches of the second stage: rare classes in each batch, synthetic lesions, a disturbed parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aslseg.cases.patches import ComponentSampler, Patch, PatchSampler
from aslseg.cases.prepared_case import Prepared, human_labelled
from aslseg.compute.augment import normal_noise
from aslseg.ssl.batches import Batches
from aslseg.ssl.nested import REACH_MM
from aslseg.ssl.synthetic_lesions import Lesions

# the network sees the distance from the parent's border up to here
EDGE_MM = 10.0
# errors of the first stage: an offset of the whole border, bulges of it, no parent at all
OFFSET_MM, BULGE_MM, MISSING = 3.0, 4.0, 0.1


def plain(maps: Tensor) -> Tensor:
    """Relative intensities and depth in the parent (B, 2, i, j, k) to network input in 0..1."""
    return torch.cat([maps[:, :1], _channel(maps[:, 1:])], 1)


def varied(maps: Tensor, generator: torch.Generator) -> Tensor:
    """The same with changed intensities, and the parent as the first stage might have drawn it.

    Brightness changes little, since it is relative to the parent already.
    """
    n = len(maps)
    u = torch.rand(n, 5, generator=generator).to(maps.device)[:, :, None, None, None, None] * 2 - 1
    image = 0.5 + (maps[:, :1] - 0.5) * (1 + 0.25 * u[:, 0]) + 0.04 * u[:, 1]
    noise = normal_noise(image.shape, generator, maps.device)
    image = image + 0.03 * (u[:, 2] + 1) / 2 * noise
    coarse = torch.randn(n, 1, 5, 5, 4, generator=generator).to(maps.device)
    bulges = F.interpolate(coarse, maps.shape[2:], mode="trilinear", align_corners=True)
    depth = maps[:, 1:] + OFFSET_MM * u[:, 3] + BULGE_MM * (u[:, 4] + 1) / 2 * bulges
    missing = torch.rand(n, generator=generator).to(maps.device) < MISSING
    depth = torch.where(missing[:, None, None, None, None], 0.0, depth)
    return torch.cat([image, _channel(depth)], 1)


def _channel(depth: Tensor) -> Tensor:
    return 0.5 + 0.5 * ((depth - REACH_MM) / EDGE_MM).clamp(-1, 1)


class NestedBatches(Batches):
    """Batches of the second stage; its first label is the parent. Images and depths are two channels."""

    network: Mapping[str, Any] = MappingProxyType({"channels": 2, "last_relu": False})

    def sampler(self, labelled: Sequence[Prepared], patch: tuple[int, int, int]) -> PatchSampler:
        """Draws labelled patches, and learns what the lesions look like that people have labelled."""
        labels = self.settings.label_set
        human = human_labelled(labelled)
        self.lesions = Lesions(human, labels, self.settings.nested_synthetic)
        rare = [n + 1 for n, parent in enumerate(labels.parents) if parent is not None]
        return ComponentSampler(labelled, patch, len(labels), rare)

    def draw(self, rng: np.random.Generator) -> list[Patch]:
        """The labelled patches of a batch, some of them with synthetic lesions."""
        return [self.lesions.into(patch, rng) for patch in super().draw(rng)]

    def strong(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """See :func:`varied`."""
        return varied(image, generator)

    def weak(self, image: Tensor) -> Tensor:
        """See :func:`plain`."""
        return plain(image)
