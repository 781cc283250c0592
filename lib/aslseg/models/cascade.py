"""The chain of trained models, ssl -> sam -> adapter, and CFR's canvas model beside it.

:func:`compute` is the one place that knows what a model is given and what comes out. A round keeps the results on disk
(:mod:`aslseg.rounds.steps.pipeline`), the server keeps them in memory (:mod:`aslseg.serving.cascade_cache`), and
:class:`Cascade` segments files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.prepare import Spacing, prepare
from aslseg.errors import BadImageError, NoModelError
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.loaded import load_model
from aslseg.models.model_set import ModelSet
from aslseg.models.published import find_published
from aslseg.sam.cfr import canvas
from aslseg.sam.predictor.redraw import redraw
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback, Volume, no_progress
from aslseg.volume.geometry import Grid
from aslseg.volume.io import case_id, extension, read_image, write_label

logger = logging.getLogger(__name__)

NEEDS: Mapping[ModelKind, tuple[ModelKind, ...]] = {
    ModelKind.SSL: (),
    ModelKind.SAM: (ModelKind.SSL,),
    ModelKind.ADAPTER: (ModelKind.SAM, ModelKind.SSL),
    ModelKind.CANVAS: (),
}
"""The stages whose regions a stage works on."""


@dataclass(frozen=True)
class CascadeInput:
    """A scan as the stages are given it.

    Attributes:
        image: (i, j, k) float32 in 0..1 on the working grid.
        grid: Between the working grid and the scan's own.
        load_native: Reads the scan on its own grid; only called by a stage that needs finer voxels than ``image`` has.
    """

    image: np.ndarray
    grid: Grid
    load_native: Callable[[], Volume]

    @classmethod
    def from_volume(
        cls,
        volume: Volume,
        settings: Settings,
        spacing: Spacing,
        load_native: Callable[[], Volume] | None = None,
    ) -> CascadeInput:
        """Bring a scan to the working grid.

        Args:
            volume: The scan.
            settings: Intensity window.
            spacing: Working spacing in mm along x, y, z; None keeps the scan's own.
            load_native: Reads the scan again; without it the volume itself is kept.
        """
        image, grid = prepare(volume, settings, spacing)
        return cls(image, grid, load_native or (lambda: volume))


@dataclass(frozen=True)
class StageOutput:
    """What a stage makes of a scan.

    Attributes:
        regions: Region probabilities (N, i, j, k) float32 on the working grid.
        notes: As :class:`aslseg.ssl.predict.Prediction` has them.
    """

    regions: np.ndarray
    notes: tuple[str, ...] = ()


def compute(
    kind: ModelKind, model: Any, given: CascadeInput, before: Mapping[ModelKind, np.ndarray], settings: Settings
) -> StageOutput:
    """Run one stage on one scan.

    Args:
        kind: The stage.
        model: Its loaded model (:func:`aslseg.models.loaded.load_model`).
        given: The scan.
        before: Region probabilities (N, i, j, k) of the stages in ``NEEDS[kind]``.
        settings: Labels and prompts.

    Raises:
        NotEnoughMemoryError: The scan does not fit into memory, even in small windows.
    """
    if kind == ModelKind.SSL:
        found = model.run(given.image, regions=True)
        return StageOutput(found.values, found.notes)
    if kind == ModelKind.SAM:
        return StageOutput(redraw(model, given.image, before[ModelKind.SSL], settings))
    if kind == ModelKind.ADAPTER:
        return StageOutput(model.predict(given.image, before[ModelKind.SAM], before[ModelKind.SSL]))
    probabilities = canvas.predict(model, given.image, settings)
    return StageOutput(settings.label_set.region_probabilities(probabilities))


def compute_chain(
    kind: ModelKind,
    get_model: Callable[[ModelKind], Any],
    given: CascadeInput,
    settings: Settings,
    known: MutableMapping[ModelKind, StageOutput],
    seconds: MutableMapping[str, float] | None = None,
) -> StageOutput:
    """Run a stage and, first, those that it needs and that are not known yet.

    Args:
        kind: The last stage.
        get_model: Gives the loaded model of a kind; called only for stages that are computed.
        given: The scan.
        settings: Labels and prompts.
        known: Results so far; what is computed is added.
        seconds: Gets the seconds of each stage that was computed.
    """
    if kind not in known:
        before = {need: compute_chain(need, get_model, given, settings, known, seconds).regions for need in NEEDS[kind]}
        model, started = get_model(kind), time.perf_counter()
        known[kind] = compute(kind, model, given, before, settings)
        if seconds is not None:
            seconds[kind.value] = time.perf_counter() - started
    return known[kind]


@dataclass(frozen=True)
class Cascade:
    """Loaded models that work together, to segment scans with.

    Attributes:
        models: Kind to loaded model. The SSL model is among them, and of each other kind what it needs.
        settings: Labels, window and prompts.
    """

    models: Mapping[ModelKind, Any]
    settings: Settings

    @classmethod
    def load(cls, files: Mapping[ModelKind, Path], settings: Settings) -> Cascade:
        """Load model files by kind.

        Raises:
            BadWeightsError: A file is damaged, of another kind, or made for other labels.
        """
        return cls({kind: load_model(kind, path, settings) for kind, path in files.items()}, settings)

    @classmethod
    def published(cls, kind: ModelKind, paths: Paths, settings: Settings) -> Cascade:
        """Load the published model of a kind and those that it needs.

        Raises:
            NoModelError: One of them is not published.
            BadWeightsError: As :meth:`load`.
        """
        return cls.load(published_files(paths, kind), settings)

    def outputs(self, given: CascadeInput) -> dict[ModelKind, StageOutput]:
        """The results of all stages on a scan."""
        known: dict[ModelKind, StageOutput] = {}
        for kind in self.models:
            compute_chain(kind, self.models.__getitem__, given, self.settings, known)
        return known

    def masks(self, volume: Volume) -> dict[ModelKind, np.ndarray]:
        """Class maps (i, j, k) uint8 of all stages on the scan's own grid."""
        return {kind: mask for kind, (mask, _) in self.masks_with_notes(volume).items()}

    def masks_with_notes(self, volume: Volume) -> dict[ModelKind, tuple[np.ndarray, tuple[str, ...]]]:
        """The same, each with what there is to say of it."""
        given = CascadeInput.from_volume(volume, self.settings, self.models[ModelKind.SSL].spacing)
        labels, outputs = self.settings.label_set, self.outputs(given)
        notes = tuple(dict.fromkeys(note for out in outputs.values() for note in out.notes))
        return {kind: (given.grid.regions_to_native(out.regions, labels), notes) for kind, out in outputs.items()}


def published_files(paths: Paths, kind: ModelKind) -> ModelSet:
    """The published model of a kind and those that it needs, their hashes checked.

    Raises:
        NoModelError: One of them is not published, or its file is damaged.
    """
    needed = [k for k in PUBLISHED_KINDS if k == kind or k in NEEDS[kind]]
    found = {k: find_published(paths, k, check=True) for k in needed}
    for k, entry in found.items():
        if entry is None:
            raise NoModelError(f"no {k} model is published in {paths.models}; run `aslseg round` first")
    return ModelSet({k: entry.path for k, entry in found.items() if entry})


def segment_files(
    model: str, source: Path, target: Path, paths: Paths, settings: Settings, report: ProgressCallback = no_progress
) -> tuple[dict[str, str], dict[str, str]]:
    """Segment a scan, or a folder of scans, with the published models.

    Args:
        model: ``ssl``, ``sam`` (which redraws the SSL mask), ``adapter`` or ``aslseg`` (all of them, one after the
            other).
        source: Image file or folder.
        target: Label file, or the folder for ``<id>.nii.gz``.
        paths: Where the models are published.
        settings: Labels, window and prompts.
        report: Called with (done, total) after each scan.

    Returns:
        Case to written file, and case to the reason why it was skipped.

    Raises:
        NoModelError: A model that is needed is not published.
    """
    kind = ModelKind.ADAPTER if model == "aslseg" else ModelKind(model)
    cascade = Cascade.published(kind, paths, settings)
    scans = sorted(p for p in source.iterdir() if extension(p)) if source.is_dir() else [source]
    single = not source.is_dir() and extension(target) is not None
    written, skipped = {}, {}
    for number, scan in enumerate(scans, 1):
        out = target if single else target / f"{case_id(scan)}.nii.gz"
        try:
            volume = read_image(scan, settings.max_voxels)
            mask, notes = cascade.masks_with_notes(volume)[kind]
            for note in notes:
                logger.warning("%s: %s", case_id(scan), note)
            write_label(out, mask, volume.affine)
            written[case_id(scan)] = str(out)
        except BadImageError as error:
            skipped[case_id(scan)] = str(error)
        report(number, len(scans))
    return written, skipped
