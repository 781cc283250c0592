"""Refining SAM's masks with a trained adaptation network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aslseg.adaptation.network import AdaptationNetwork
from aslseg.cases.relative import centres, parents, views
from aslseg.compute.augment import centre
from aslseg.compute.bounding_box import bounding_box
from aslseg.compute.device import bfloat16_pays, choose_device
from aslseg.compute.sliding_window import plans, slabs
from aslseg.compute.weights import load_weights
from aslseg.errors import BadWeightsError
from aslseg.settings import Settings

FOREGROUND = 0.3
"""Probability from which a voxel of an input counts as foreground."""
MARGIN = 12
"""Voxels around the foreground that are predicted, too."""


class AdapterModel:
    """A trained adaptation network, ready to predict.

    Attributes:
        metadata: As stored by :func:`aslseg.adaptation.train.train`.
    """

    def __init__(self, network: nn.Module, metadata: dict[str, Any], settings: Settings) -> None:
        self.metadata = metadata
        self.settings = settings
        self.device = choose_device(settings)
        self.bf16 = bfloat16_pays(self.device)
        self.network = network.eval().to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @torch.inference_mode()
    def predict(self, image: np.ndarray, sam_regions: np.ndarray, ssl_regions: np.ndarray) -> np.ndarray:
        """Refined region probabilities of a volume on the working grid.

        Only a box around the foreground of both inputs is predicted; everything outside is 0. NaN in an input counts
        as 0.

        Args:
            image: (i, j, k) float32 in 0..1.
            sam_regions: SAM's region probabilities, (R, i, j, k).
            ssl_regions: The SSL model's region probabilities, (R, i, j, k).

        Returns:
            (R, i, j, k) float32 in 0..1, finite.

        Raises:
            ValueError: Shapes that do not belong together or another number of regions.
        """
        wanted = (len(self.metadata["labels"]), *image.shape)
        if sam_regions.shape != wanted or ssl_regions.shape != wanted:
            raise ValueError(f"expected regions of shape {wanted}, got {sam_regions.shape} and {ssl_regions.shape}")
        out = np.zeros(wanted, np.float32)
        box = self._box(sam_regions, ssl_regions)
        if box is None:
            return out
        labels, shown = self.settings.label_set, self.metadata.get("relative")
        # of the whole scan, as in training
        found = centres(image, [p >= 0.5 for p in ssl_regions], labels) if shown else {}
        crops = [views(image[box], found, labels, shown), sam_regions[:, *box], ssl_regions[:, *box]]
        inputs = np.nan_to_num(np.concatenate(crops).astype(np.float32), posinf=1, neginf=0).clip(0, 1)
        i, j, k = self.metadata["patch"]
        plan = next(plans(self.device, (i, j, k)))
        refined = out[:, *box]
        for where, logits in slabs(inputs, self._logits, len(out), plan, self.settings.overlap):
            refined[:, *where] = torch.sigmoid(logits).cpu().numpy()
        return out

    def _box(self, *inputs: np.ndarray) -> tuple[slice, ...] | None:
        """Foreground of the inputs with a margin, at least as large as a window where the volume is."""
        found = np.any([(regions >= FOREGROUND).any(0) for regions in inputs], axis=0)
        tight = bounding_box(found)
        if tight is None:
            return None
        box = []
        for axis, (window, around) in enumerate(zip(self.metadata["patch"], tight, strict=True)):
            low, high = around.start - MARGIN, around.stop + MARGIN
            short = max(window - (high - low), 0)
            low, high = low - short // 2, high + short - short // 2
            size = found.shape[axis]
            # move the box inside before cutting it, so that it keeps a window's size
            shift = max(-low, 0) - max(high - size, 0)
            box.append(slice(max(low + shift, 0), min(high + shift, size)))
        return tuple(box)

    def _logits(self, windows: Tensor) -> Tensor:
        """Logits (B, R, i, j, k) of windows (B, V + 2R, i, j, k) in 0..1.

        The images are centred here, after small volumes were padded with 0, so that the padding is air as in training.
        """
        images = windows.shape[1] - 2 * len(self.metadata["labels"])
        windows = torch.cat([centre(windows[:, :images]), windows[:, images:]], 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(windows)


def load(path: Path, settings: Settings) -> AdapterModel:
    """Load a model written by :func:`aslseg.adaptation.train.train`.

    Raises:
        BadWeightsError: Damaged, of another kind, or trained for other labels.
    """
    state, metadata = load_weights(path, "adapter")
    labels = list(settings.label_set.names)
    if metadata["labels"] != labels:
        raise BadWeightsError(
            f"{path.name} was trained for {', '.join(metadata['labels'])}, but labels = {', '.join(labels)}; "
            "use another model_dir or set labels to what the model knows"
        )
    images = 1 + (len(parents(settings.label_set)) if metadata.get("relative") else 0)
    network = AdaptationNetwork(len(labels), metadata["strides"], images)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise BadWeightsError(f"{path.name} does not fit its network: {str(error)[:200]}; retrain it") from None
    return AdapterModel(network, metadata, settings)
