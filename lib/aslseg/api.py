"""The public functions of ``aslseg``, for notebooks and scripts; docs/python.md shows how to use them.

Every function takes plain paths and a :class:`aslseg.settings.Settings`; without one the defaults hold. Nothing is read
from the environment or from ``.env``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from aslseg.agreement.evaluate import evaluate_folders
from aslseg.errors import BadLabelError, BadSettingsError
from aslseg.models.cascade import Cascade
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.prompts.from_client import parse
from aslseg.registry import suggest
from aslseg.rounds import run
from aslseg.sam.clicks.automatic_mask import AutomaticMask
from aslseg.sam.clicks.session import ClickSession
from aslseg.sam.modeling import build
from aslseg.sam.predictor.embeddings import EmbeddingCache
from aslseg.sam.predictor.slice_predictor import SlicePredictor
from aslseg.sam.predictor.slices import SliceSource
from aslseg.serving.open_scans import SliceOrientation
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback, Volume, no_progress
from aslseg.volume import io
from aslseg.volume.intensity import window_of

Voxels = Sequence[Sequence[float]] | np.ndarray
ModelName = Literal["ssl", "sam", "adapter", "aslseg"]


def read_image(path: str | Path) -> Volume:
    """Read a scan (NIfTI, NRRD or MetaImage).

    Returns:
        The voxels (i, j, k), float32 in stored units, and the affine from voxel indices to RAS millimetres.

    Raises:
        BadImageError: The file is no finite 3-D volume.
    """
    return io.read_image(Path(path))


def write_label(path: str | Path, class_map: np.ndarray, affine: np.ndarray) -> None:
    """Write a class map (i, j, k) as NIfTI, atomically: the file is complete or not there.

    Args:
        path: ``*.nii.gz`` or ``*.nii``.
        class_map: 0 for background, 1..N for the labels.
        affine: 4 x 4, of the scan.
    """
    io.write_label(Path(path), class_map, affine)


class Model:
    """Published models that segment a scan together; made by :func:`load_model`.

    Attributes:
        kind: The model whose mask is returned, ``ssl``, ``sam`` or ``adapter``.
        labels: Names of the values 1..N.
    """

    def __init__(self, cascade: Cascade, kind: ModelKind) -> None:
        self.kind, self.labels = kind, cascade.settings.label_set.names
        self._cascade = cascade

    def segment(self, volume: Volume) -> np.ndarray:
        """Segment a scan.

        Returns:
            Class map (i, j, k) on the scan's own grid, uint8: 0 for background, n for ``labels[n - 1]``.

        Raises:
            NotEnoughMemoryError: The scan does not fit into memory, even in small windows.
        """
        return self._cascade.masks(volume)[self.kind]


def load_model(studies: str | Path, name: ModelName = "aslseg", settings: Settings | None = None) -> Model:
    """Load the models that were published for a studies folder.

    Args:
        studies: The studies folder on which rounds ran.
        name: ``ssl`` for the semi-supervised network alone, ``sam`` for its mask redrawn by SAM, ``adapter`` or
            ``aslseg`` for that mask refined by the adaptation network.
        settings: Labels, device and where models are published.

    Raises:
        BadSettingsError: There is no model of that name.
        NoModelError: One of the models is not published yet.
        BadWeightsError: A model file is damaged or was made for other labels.
    """
    settings = settings or Settings()
    if name not in get_args(ModelName):
        raise BadSettingsError(f"unknown model {name!r}; {suggest(name, list(get_args(ModelName)))}")
    kind = ModelKind.ADAPTER if name == "aslseg" else ModelKind(name)
    return Model(Cascade.published(kind, Paths(settings, studies), settings), kind)


class Clicks:
    """Clicks and a box on one object of one scan, answered by SAM with the whole object in 3-D.

    Embeddings and earlier answers are kept, so that a further click asks SAM about what changed only.

    Args:
        volume: The scan.
        settings: Modality, intensity window and prompts.
        studies: Studies folder whose published SAM answers. Without one, or while none is published, it is the SAM of
            the setting ``sam_checkpoint``, or the small one that comes with the package.
        automatic_mask: (i, j, k) bool or probabilities of the object, which clicks then repair.

    Raises:
        BadLabelError: ``automatic_mask`` has another shape than the scan.
        BadWeightsError: The SAM file is damaged or of an unknown format.
    """

    def __init__(
        self,
        volume: Volume,
        settings: Settings | None = None,
        studies: str | Path | None = None,
        automatic_mask: np.ndarray | None = None,
    ) -> None:
        settings = settings or Settings()
        shape = volume.array.shape
        if automatic_mask is not None and automatic_mask.shape != shape:
            raise BadLabelError(f"automatic_mask: expected the scan's shape {shape}, got {automatic_mask.shape}")
        self._orientation = SliceOrientation.of(shape, volume.affine, native=False)
        slices = SliceSource(self._orientation.view(volume.array), window_of(volume.array, settings))
        automatic = None
        if automatic_mask is not None:
            automatic = AutomaticMask(self._orientation.view(automatic_mask.astype(np.float32)), slices.shape)
        if studies is None:
            sam = build.load(build.base_path(settings), settings)
        else:
            sam = Models(settings, Paths(settings, studies)).get(ModelKind.SAM)
        cache = EmbeddingCache(settings.embedding_memory_mb * 1e6)
        self._session = ClickSession(SlicePredictor(sam, slices, settings, cache), automatic)

    def segment(self, inside: Voxels = (), outside: Voxels = (), box: Sequence[float] | None = None) -> np.ndarray:
        """The object that all clicks so far describe.

        Args:
            inside: Voxel indices (n, 3) as (i, j, k) that belong to the object, in the order they were made.
            outside: Voxel indices (n, 3) that do not.
            box: (i0, i1, j0, j1, k0, k1), inclusive, around the object; nothing is drawn outside it. An
                automatic mask keeps what it has there.

        Returns:
            Mask (i, j, k), uint8. Clicked voxels have the value that the click says.

        Raises:
            BadPromptError: Something other than finite voxel indices. What lies outside the scan is left out, with a
                warning.
        """
        request = {"foreground": _lists(inside), "background": _lists(outside), "roi": None if box is None else [*box]}
        prompt = parse(request, self._orientation.shape)
        for note in prompt.notes:
            warnings.warn(note, stacklevel=2)
        asked = self._orientation.prompt(prompt)
        mask = np.zeros(self._orientation.shape, np.uint8)
        view = self._orientation.view(mask)
        view[...] = self._session.answer(asked)
        view[tuple(asked.foreground.T)] = 1
        view[tuple(asked.background.T)] = 0
        return mask


def evaluate(
    pred: str | Path,
    truth: str | Path,
    settings: Settings | None = None,
    unit: Literal["mm", "voxel"] = "mm",
) -> dict[str, Any]:
    """Dice, Jaccard, HD95 and ASD of a folder of predicted labels against a folder of true ones.

    Args:
        pred: Folder of predicted label files.
        truth: Folder of true label files of the same names.
        settings: Labels.
        unit: Unit of the distances.

    Returns:
        As :func:`aslseg.agreement.evaluate.evaluate_folders`; ``summary`` holds mean and standard deviation by label.

    Raises:
        NotEnoughCasesError: A folder is missing, or no prediction has a truth.
    """
    return evaluate_folders(Path(pred), Path(truth), (settings or Settings()).label_set, unit)


def run_round(
    studies: str | Path, settings: Settings | None = None, report: ProgressCallback = no_progress
) -> dict[str, Any]:
    """Run the next round on a studies folder, or go on with one that was interrupted.

    Args:
        studies: The studies folder, with at least one label in ``labels/final``.
        settings: Frozen for the round.
        report: Called with (done, total) and numbers by name; what it raises stops the round.

    Returns:
        As :func:`aslseg.rounds.run.run_round`: ``promoted``, ``agreement`` by case, ``published`` by model, and more.

    Raises:
        AslsegError: As :func:`aslseg.rounds.run.run_round`.
    """
    return run.run_round(Path(studies), settings or Settings(), report)


def _lists(voxels: Voxels) -> list[list[float]]:
    return [list(voxel) for voxel in voxels]
