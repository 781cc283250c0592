"""Prediction of whole volumes with a trained SSL model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aslseg.compute.augment import centre
from aslseg.compute.device import bfloat16_pays, choose_device
from aslseg.compute.fuse_batch_norm import fuse_batch_norm
from aslseg.compute.losses import predictive_entropy
from aslseg.compute.sliding_window import Blend, out_of_memory, plans, slabs
from aslseg.compute.weights import load_weights
from aslseg.errors import BadWeightsError, NotEnoughMemoryError
from aslseg.registry import NETWORKS
from aslseg.settings import Settings

logger = logging.getLogger(__name__)

FLIPS = ((), (2,), (3,))


@dataclass(frozen=True)
class Prediction:
    """What a model says about a volume.

    Attributes:
        values: Class probabilities (1 + N, i, j, k), or region probabilities (N, i, j, k); float32.
        uncertainty: (i, j, k) float32 in 0..1, or None if not asked for; see :meth:`SSLModel.run`.
        notes: What had to be given up because memory ran out, for people; empty where nothing had to.
    """

    values: np.ndarray
    uncertainty: np.ndarray | None = None
    notes: tuple[str, ...] = ()


class SSLModel:
    """A trained SSL network with what is needed to use it.

    Attributes:
        metadata: As stored by :func:`aslseg.ssl.engine.train`.
    """

    def __init__(self, network: nn.Module, metadata: dict[str, Any], settings: Settings) -> None:
        self.metadata = metadata
        self.settings = settings
        self.device = choose_device(settings)
        folded = fuse_batch_norm(network)
        self.network = folded.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Working spacing in mm, None for the scans' own."""
        stored = self.metadata["spacing"]
        return None if stored is None else tuple(stored)

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities (1 + N, i, j, k) of a volume on the working grid; channels sum to 1. See :meth:`run`."""
        return self.run(image).values

    def regions(self, image: np.ndarray) -> np.ndarray:
        """Region probabilities (N, i, j, k) of a volume on the working grid. See :meth:`run`."""
        return self.run(image, regions=True).values

    @torch.inference_mode()
    def run(
        self, image: np.ndarray, *, regions: bool = False, uncertainty: bool = False, blend: Blend = "gaussian"
    ) -> Prediction:
        """Predict a volume by sliding windows.

        With the setting ``flips``, and a model trained with it, every window is averaged with its left-right and
        front-back mirror images. Memory: what is returned, and a slab of one window's length. When memory runs out,
        batches get smaller, then windows, then the CPU takes over; the log and ``notes`` say so.

        Args:
            image: (i, j, k) float32 in 0..1; may be a memory map.
            regions: Region probabilities (:meth:`aslseg.types.Labels.region_probabilities`) instead of the classes'.
            uncertainty: Also the entropy of the averaged class probabilities over that of a coin with 1 + N sides: 0
                where one class is certain, 1 where all are equally likely.
            blend: How windows are weighted, ``gaussian`` or ``constant`` (as the SSL papers do it).

        Raises:
            NotEnoughMemoryError: Not even the smallest windows fit.
        """
        labels, classes = self.settings.label_set, len(self.metadata["labels"]) + 1
        values = np.empty((classes - regions, *image.shape), np.float32)
        uncertainty_map = np.empty(image.shape, np.float32) if uncertainty else None
        notes: list[str] = []
        i, j, k = self.metadata["patch"]
        for plan in plans(self.device, (i, j, k)):
            if notes:
                notes[-1] += f"; went on with {plan}"
                logger.warning("%s", notes[-1])
            try:
                network = self._probabilities(plan.device, classes)
                for where, found in slabs(image, network, classes, plan, self.settings.overlap, blend):
                    if uncertainty_map is not None:
                        uncertainty_map[where] = entropy(found).cpu().numpy()
                    p = found.cpu().numpy()
                    values[:, *where] = labels.region_probabilities(p) if regions else p
                return Prediction(values, uncertainty_map, tuple(notes))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            notes.append(f"memory ran out with {plan}")
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
        raise NotEnoughMemoryError(
            f"not enough memory to predict a scan of {' x '.join(map(str, image.shape))} voxels, even with {plan}; "
            "free some memory or choose a coarser spacing"
        )

    def _probabilities(self, device: torch.device, classes: int) -> Callable[[Tensor], Tensor]:
        """Windows (B, 1, i, j, k) in 0..1 to class probabilities, on a device."""
        network = self.network if device == self.device else copy.deepcopy(self.network).to(device)
        bf16 = bfloat16_pays(device)
        flips = FLIPS if self.settings.flips and self.metadata.get("flips", True) else FLIPS[:1]

        def once(x: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = network(x.contiguous(memory_format=torch.channels_last_3d))
            return logits[:, :classes].float().softmax(1)

        def probabilities(window: Tensor) -> Tensor:
            x = centre(window)
            total = once(x)
            for axes in flips[1:]:
                total += once(x.flip(axes)).flip(axes)
            return total / len(flips)

        return probabilities


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of (C, ...) class probabilities over its largest value, ln C: (...) in 0..1."""
    return (predictive_entropy(probabilities[None])[0] / math.log(len(probabilities))).clamp_(0, 1)


def load(path: Path, settings: Settings) -> SSLModel:
    """Load a model written by :func:`aslseg.ssl.engine.train`.

    Raises:
        BadWeightsError: Damaged, of another kind, or trained for other labels.
    """
    state, metadata = load_weights(path, "ssl")
    labels = list(settings.label_set.names)
    if metadata["labels"] != labels:
        raise BadWeightsError(
            f"{path.name} was trained for {', '.join(metadata['labels'])}, but labels = {', '.join(labels)}; "
            "use another model_dir or set labels to what the model knows"
        )
    network = NETWORKS.get(metadata["network"])(metadata.get("outputs", len(labels) + 1), metadata["patch"])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise BadWeightsError(f"{path.name} does not fit its network: {str(error)[:200]}; retrain it") from None
    return SSLModel(network, metadata, settings)
