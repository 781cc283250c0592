"""Prediction of whole volumes with a trained SSL model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
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
from aslseg.compute.sliding_window import Blend, Where, out_of_memory, plans, slabs
from aslseg.compute.weights import load_weights
from aslseg.errors import BadWeightsError, NotEnoughMemoryError
from aslseg.registry import NETWORKS
from aslseg.settings import Settings
from aslseg.ssl import specks
from aslseg.ssl.nested import (
    FIRST,
    NATIVE,
    Branch,
    Geometry,
    Scale,
    View,
    branches,
    clear_outside,
    first_settings,
    largest,
    look,
    put,
    second_prefix,
    settings_of,
    split,
    top_level,
)
from aslseg.volume.geometry import resize

logger = logging.getLogger(__name__)

FLIPS = ((), (2,), (3,))


@dataclass(frozen=True)
class Prediction:
    """What a model says about a volume.

    Attributes:
        values: Class probabilities (1 + N, i, j, k), or region probabilities (N, i, j, k); float32.
        uncertainty: (i, j, k) float32 in 0..1, or None if not asked for; see :meth:`SSLModel.run`.
        notes: For people: what had to be given up because memory ran out, and parents that were not found.
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
    def classes(self) -> int:
        """Number of classes, background included."""
        return len(self.metadata["labels"]) + 1

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
        labels = self.settings.label_set
        values = np.empty((self.classes - regions, *image.shape), np.float32)
        uncertainty_map = np.empty(image.shape, np.float32) if uncertainty else None

        def take(where: Where, found: Tensor) -> None:
            if uncertainty_map is not None:
                uncertainty_map[where] = entropy(found).cpu().numpy()
            p = found.cpu().numpy()
            values[:, *where] = labels.region_probabilities(p) if regions else p

        notes = self._slide(image, take, blend)
        return Prediction(values, uncertainty_map, notes)

    def _slide(self, image: np.ndarray, take: Callable[[Where, Tensor], None], blend: Blend) -> tuple[str, ...]:
        """Give class probabilities slab by slab to ``take``, again from the start after a shortage; returns notes."""
        notes: list[str] = []
        i, j, k = self.metadata["patch"]
        for plan in plans(self.device, (i, j, k)):
            if notes:
                notes[-1] += f"; went on with {plan}"
                logger.warning("%s", notes[-1])
            try:
                network = self._probabilities(plan.device, self.classes)
                for where, found in slabs(image, network, self.classes, plan, self.settings.overlap, blend):
                    take(where, found)
                return tuple(notes)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            notes.append(f"memory ran out with {plan}")
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
        raise NotEnoughMemoryError(
            f"not enough memory to predict a scan of {' x '.join(map(str, image.shape))} voxels, even with "
            f"{plan}; free some memory or choose a coarser spacing"
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


class ScaledModel:
    """A network that sees scans on a grid of its own; what it says is on the working grid.

    Args:
        model: The network.
        scale: Its grid.
    """

    def __init__(self, model: SSLModel, scale: Scale) -> None:
        self.model, self.scale = model, scale
        self.metadata, self.spacing = model.metadata, model.spacing

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities (1 + N, i, j, k) of a volume (i, j, k) on the working grid; channels sum to 1."""
        return self.run(image).values

    def run(self, image: np.ndarray, *, blend: Blend = "gaussian") -> Prediction:
        """Predict a volume on the working grid; see :meth:`SSLModel.run`."""
        shape = self.scale.shape(image.shape)
        seen = image if shape == image.shape else resize(np.asarray(image, np.float32), shape)
        found = self.model.run(seen, blend=blend)
        if shape == image.shape:
            return found
        values = np.empty((len(found.values), *image.shape), np.float32)
        for n, channel in enumerate(found.values):
            values[n] = resize(channel, image.shape)
        return Prediction(values, notes=found.notes)


class NestedModel:
    """A first network for the top-level labels, and one inside each parent; used as :class:`SSLModel` is.

    Args:
        first: Network of the top-level labels.
        second: What is nested in which parent, where it is looked for, and by which network.
        metadata: Of the whole file.
        settings: Labels and overlap.
    """

    def __init__(
        self,
        first: ScaledModel,
        second: Sequence[tuple[Branch, Geometry, SSLModel]],
        metadata: dict[str, Any],
        settings: Settings,
    ) -> None:
        self.first, self.second = first, list(second)
        self.metadata, self.settings = metadata, settings

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Working spacing in mm, None for the scans' own."""
        return self.first.spacing

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Class probabilities (1 + N, i, j, k) of a volume on the working grid; channels sum to 1. See :meth:`run`."""
        return self.run(image).values

    def regions(self, image: np.ndarray) -> np.ndarray:
        """Region probabilities (N, i, j, k) of a volume on the working grid. See :meth:`run`."""
        return self.run(image, regions=True).values

    def run(
        self, image: np.ndarray, *, regions: bool = False, uncertainty: bool = False, blend: Blend = "gaussian"
    ) -> Prediction:
        """Predict a volume: the first stage everywhere, then the second inside each parent's box.

        In the box the mean of both stages says what belongs to the parent, the second stage which nested label it is,
        and the first which of the other top-level labels the rest is. Outside of the box there is no parent. Where a
        parent is not found, the whole scan is its box, the second stage decides alone, and ``notes`` says so.
        Components below the limits in the metadata (:mod:`aslseg.ssl.specks`) count as the label around them.

        Args:
            image: (i, j, k) float32 in 0..1 on the working grid.
            regions, uncertainty, blend: As for :meth:`SSLModel.run`.

        Raises:
            NotEnoughMemoryError: As :meth:`SSLModel.run`.
        """
        labels = self.settings.label_set
        found = self.first.run(image, blend=blend)
        classes = found.values.argmax(0)
        p = np.zeros((len(labels) + 1, *image.shape), np.float32)
        top = top_level(labels)
        p[[0, *(n + 1 for n in top)]] = found.values
        notes = list(found.notes)
        for branch, geometry, model in self.second:
            parent = largest(classes == top.index(branch.parent) + 1)
            if not parent.any():
                notes.append(
                    f"{labels.names[branch.parent]} was not found; "
                    f"the whole scan was searched for {', '.join(branch.labels.names[1:])}"
                )
            view = look(image, parent, geometry)
            inside, more = inner_probabilities(model, view, blend)
            notes += more
            clear_outside(p, view.where, branch)
            box = p[:, *view.where]
            put(box, inside, branch, found=bool(parent.any()))
            # this box may cut the components of another parent's labels
            known = self.metadata.get("specks", {})
            limits = {name: known[name] for name in branch.labels.names if name in known}
            specks.clear(box, labels, limits, geometry.working)
        return Prediction(*_finished(p, self.settings, regions, uncertainty), tuple(notes))


def inner_probabilities(model: SSLModel, view: View, blend: Blend = "gaussian") -> tuple[np.ndarray, tuple[str, ...]]:
    """Class probabilities (1 + M, i, j, k) of the second stage, on the working grid's box, and notes."""
    found = model.run(view.image, blend=blend)
    shape = tuple(s.stop - s.start for s in view.where)
    p = np.stack([resize(channel, shape) for channel in found.values])
    return p / p.sum(0), found.notes


def _finished(
    p: np.ndarray, settings: Settings, regions: bool, uncertainty: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Class or region probabilities, and uncertainty; slice by slice, so that no second copy of them is held."""
    labels = settings.label_set
    entropies = np.empty(p.shape[1:], np.float32) if uncertainty else None
    for i in range(p.shape[1]):
        if entropies is not None:
            entropies[i] = entropy(torch.from_numpy(p[:, i])).numpy()
        if regions:
            p[:-1, i] = labels.region_probabilities(p[:, i])
    return (p[:-1] if regions else p), entropies


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of (C, ...) class probabilities over its largest value, ln C: (...) in 0..1."""
    return (predictive_entropy(probabilities[None])[0] / math.log(len(probabilities))).clamp_(0, 1)


def load(path: Path, settings: Settings) -> SSLModel | NestedModel:
    """Load a model written by :func:`aslseg.ssl.training.train`, of one stage or of two.

    Raises:
        BadWeightsError: Damaged, of another kind, or trained for other labels.
    """
    state, metadata = load_weights(path, "ssl")
    labels = settings.label_set
    if metadata["labels"] != list(labels.names):
        raise BadWeightsError(
            f"{path.name} was trained for {', '.join(metadata['labels'])}, but labels = {', '.join(labels.names)}; "
            "use another model_dir or set labels to what the model knows"
        )
    if "stages" not in metadata:
        return stage_model(path, state, metadata, settings)
    stored = metadata["stages"]
    found = {labels.names[b.parent]: b for b in branches(labels)}
    if not set(stored["second"]) <= set(found):
        raise BadWeightsError(
            f"{path.name} was trained with {', '.join(stored['second'])} as the parents of nested labels, but nested = "
            f"{settings.nested!r}; set nested to what the model knows or retrain it"
        )
    first = ScaledModel(
        _of_labels(path, split(state, FIRST), stored["first"], first_settings(settings)), scale_of(metadata)
    )
    second = []
    for name, entry in stored["second"].items():
        branch = found[name]
        model = _of_labels(
            path, split(state, second_prefix(name)), entry["model"], settings_of(settings, branch.labels)
        )
        second.append((branch, Geometry.of(entry["geometry"]), model))
    return NestedModel(first, second, metadata, settings)


def _of_labels(path: Path, state: dict[str, Any], stored: dict[str, Any], settings: Settings) -> SSLModel:
    """A stage, if it knows the labels that it has with these settings."""
    if stored["labels"] != list(settings.labels):
        raise BadWeightsError(
            f"{path.name} has a stage for {', '.join(stored['labels'])}, but with nested as it is set now it would be "
            f"for {', '.join(settings.labels)}; set nested to what the model knows or retrain it"
        )
    return stage_model(path, state, stored, settings)


def scale_of(metadata: Mapping[str, Any]) -> Scale:
    """The first stage's grid of a file of two stages; files without one have the working grid."""
    own = metadata["spacing"] or NATIVE
    return Scale.of(metadata["stages"].get("scale") or {"spacing": own, "working": own})


def stage_model(path: Path, state: dict[str, Tensor], metadata: dict[str, Any], settings: Settings) -> SSLModel:
    """One network of a file with what belongs to it.

    Raises:
        BadWeightsError: The tensors do not fit, or it is a second stage of an earlier version.
    """
    outputs, options = metadata.get("outputs", len(metadata["labels"]) + 1), metadata.get("options", {})
    if options.get("channels", 1) != 1:
        parent = metadata["labels"][0]
        raise BadWeightsError(
            f"{path.name} is of a version in which the network of {parent} saw the mask of {parent} as well; the next "
            "round trains a new one (Train, or `aslseg round`)"
        )
    network = NETWORKS.get(metadata["network"])(outputs, metadata["patch"], **options)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise BadWeightsError(f"{path.name} does not fit its network: {str(error)[:200]}; retrain it") from None
    return SSLModel(network, metadata, settings)
