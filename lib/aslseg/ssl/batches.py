"""The batch of a step: patches of two streams, augmented; depends on nothing but seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aslseg.cases.patches import Patch, PatchSampler
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.augment import centre, random_geometry, random_intensity, warp
from aslseg.compute.prefetch import Prefetched
from aslseg.settings import ResolvedSettings
from aslseg.ssl import distributed
from aslseg.ssl.methods.base import Batch


class Batches:
    """Batches by their number.

    Args:
        labelled: Human-labelled cases, and promoted ones.
        unlabelled: Cases of the unlabelled stream.
        settings: Batch sizes, flips, seed.
        patch: Patch shape in voxels.
        device: Where batches are made and lie.

    Attributes:
        network: What the network's factory is called with for these images, besides classes and patch.
        labelled, unlabelled: Samplers of the streams; the second is None without unlabelled cases.
    """

    network: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        labelled: Sequence[Prepared],
        unlabelled: Sequence[Prepared],
        settings: ResolvedSettings,
        patch: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self.settings, self.device = settings, device
        self.labelled = self.sampler(labelled, patch)
        self.unlabelled = PatchSampler(unlabelled, patch, len(settings.label_set)) if unlabelled else None
        # a GPU waits for patches with synthetic lesions longer than it takes for them
        self._drawn = self._patches if device.type == "cpu" else Prefetched(self._patches, distributed.world())

    def sampler(self, labelled: Sequence[Prepared], patch: tuple[int, int, int]) -> PatchSampler:
        """Draws labelled patches."""
        return PatchSampler(labelled, patch, len(self.settings.label_set))

    def draw(self, rng: np.random.Generator, around: Sequence[int] = ()) -> list[Patch]:
        """The labelled patches of a batch, the first of them around a voxel of each of some classes."""
        return self.labelled.draw_batch(rng, self.settings.batch_labelled, around)

    def strong(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, 1, i, j, k) with changed intensities."""
        return random_intensity(image, generator, self.settings.modality == "ct")

    def __call__(self, number: int) -> Batch:
        """A batch, on the device."""
        return self._batch(number, *self._drawn(number))

    def watched(self, number: int, least: int) -> Iterator[Batch]:
        """Batches without unlabelled patches for :mod:`aslseg.ssl.class_watch`.

        Half of the patches of a batch, at least one, lie around the classes in turn: each that a label shows is seen.

        Args:
            number: Of the first; others than those of training have the same number.
            least: So many batches, or as many as it takes to see each class.
        """
        seed, values = self.settings.seed, sorted(self.labelled.holding)
        each = max(1, self.settings.batch_labelled // 2)
        for n in range(max(least, -(-len(values) // each))):
            around = [values[(n * each + k) % len(values)] for k in range(min(each, len(values)))]
            yield self._batch(number + n, self.draw(np.random.default_rng([seed, number + n, 1]), around), [])

    def _batch(self, number: int, drawn: list[Patch], free_drawn: list[Patch]) -> Batch:
        """A batch of patches of the two streams, augmented."""
        s = self.settings
        torch.manual_seed(s.seed * 1_000_003 + number)
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + number)
        image, maps = self._images(drawn), self._maps(drawn)
        grid = random_geometry(image.shape, generator, s.flips, self.device)
        image = self.strong(warp(image, grid), generator)
        maps = warp(maps.float(), grid, "nearest")
        if free_drawn:
            free = self._images(free_drawn)
            free = warp(free, random_geometry(free.shape, generator, s.flips, self.device))
            # the weak ones are as a network sees them when it predicts
            strong, weak = self.strong(free, generator), free
        else:
            strong = weak = image[:0]
        layout = torch.channels_last_3d
        return Batch(
            centre(image).contiguous(memory_format=layout),
            maps[:, 0].long(),
            maps[:, 1],
            centre(strong).contiguous(memory_format=layout),
            centre(weak).contiguous(memory_format=layout),
        )

    def _patches(self, number: int) -> tuple[list[Patch], list[Patch]]:
        """The labelled and the unlabelled patches of a batch."""
        s = self.settings
        rng = np.random.default_rng([s.seed, number])
        drawn = self.draw(rng)
        if self.unlabelled is None or s.ssl_method == "supervised":
            return drawn, []
        return drawn, self.unlabelled.draw_batch(rng, s.batch_unlabelled)

    def _images(self, drawn: list[Patch]) -> Tensor:
        """Images (B, 1, i, j, k)."""
        return torch.stack([torch.as_tensor(d.image).to(self.device)[None] for d in drawn])

    def _maps(self, drawn: list[Patch]) -> Tensor:
        """Class maps and voxel weights (B, 2, i, j, k), float32."""
        pairs = [torch.stack([torch.as_tensor(d.label).float(), torch.as_tensor(d.weight)]) for d in drawn]
        return torch.stack([pair.to(self.device) for pair in pairs])
