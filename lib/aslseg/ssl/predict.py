"""Sliding-window prediction of whole volumes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from aslseg.errors import BadWeightsError
from aslseg.registry import NETWORKS
from aslseg.settings import Settings
from aslseg.ssl.augment import centre
from aslseg.ssl.engine import choose_device
from aslseg.ssl.networks import bfloat16_pays
from aslseg.weights import load_weights

logger = logging.getLogger(__name__)

FLIPS = ((), (2,), (3,))


class SSLModel:
    """A trained SSL network with what is needed to use it.

    Attributes:
        metadata: As stored by :func:`aslseg.ssl.engine.train`.
    """

    def __init__(self, network: nn.Module, metadata: dict[str, Any], settings: Settings) -> None:
        self.metadata = metadata
        self.settings = settings
        self.device = choose_device(settings)
        self.bf16 = bfloat16_pays(self.device)
        self.network = network.eval().to(self.device)
        self.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Working spacing in mm, None for the scans' own."""
        stored = self.metadata["spacing"]
        return None if stored is None else tuple(stored)

    @torch.inference_mode()
    def predict(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities of a volume on the working grid.

        Args:
            image: (i, j, k) float32 in 0..1.

        Returns:
            (1 + N, i, j, k) float32; channels sum to 1.
        """
        x = centre(torch.from_numpy(np.array(image, np.float32)))[None, None]
        flips: Sequence[tuple[int, ...]] = FLIPS if self.settings.flips else FLIPS[:1]
        parts = [self._windows(x.flip(axes)).flip(axes) for axes in flips]
        return torch.stack(parts).mean(0)[0].numpy()

    def _windows(self, x: Tensor) -> Tensor:
        found = sliding_window_inference(
            x,
            tuple(self.metadata["patch"]),
            1 if self.device.type == "cpu" else 4,
            self._probabilities,
            overlap=self.settings.overlap,
            mode="gaussian",
            sw_device=self.device,
            device=torch.device("cpu"),
            padding_mode="constant",
            cval=-2.0,
        )
        return torch.as_tensor(found)

    def _probabilities(self, window: Tensor) -> Tensor:
        window = window.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(window)
        return logits[:, : len(self.metadata["labels"]) + 1].float().softmax(1)


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
