"""A scan through the trained stages, ssl -> sam -> adapter or ssl and canvas (CFR), and back to its own grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.adaptation import predict as adaptation
from aslseg.cases.prepare import prepare
from aslseg.errors import BadImageError, NoModelError
from aslseg.models.published import KINDS, find_published
from aslseg.sam.cfr import canvas
from aslseg.sam.modeling import build
from aslseg.sam.predictor.redraw import redraw
from aslseg.settings import Paths, Settings
from aslseg.ssl import predict as ssl
from aslseg.types import ProgressCallback, Volume, no_progress
from aslseg.volume.io import case_id, extension, read_image, write_label


@dataclass(frozen=True)
class Cascade:
    """Loaded models of the stages; each stage may be missing, but needs the ones before it.

    Attributes:
        models: Stage name (``ssl``, ``sam``, ``adapter``, ``canvas``, ``retrained``) to loaded model.
        settings: Labels, window and prompts.
    """

    models: Mapping[str, Any]
    settings: Settings

    @classmethod
    def load(cls, paths: Mapping[str, Path], settings: Settings) -> Cascade:
        """Load model files by stage name.

        Raises:
            BadWeightsError: As the loaders.
        """
        loaders = {"ssl": ssl.load, "sam": build.load, "adapter": adaptation.load, "canvas": canvas.load}
        loaders["retrained"] = ssl.load
        return cls({stage: loaders[stage](path, settings) for stage, path in paths.items()}, settings)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the loaded stages."""
        return tuple(self.models)

    def regions(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Region probabilities of every stage on the working grid.

        Args:
            image: (i, j, k) float32 in 0..1.

        Returns:
            Stage to (N, i, j, k) float32.
        """
        out = {}
        for stage in ("ssl", "retrained"):
            if stage in self.models:
                out[stage] = self.models[stage].regions(image)
        if "sam" in self.models:
            out["sam"] = redraw(self.models["sam"], image, out["ssl"], self.settings)
        if "adapter" in self.models:
            out["adapter"] = self.models["adapter"].predict(image, out["sam"], out["ssl"])
        if "canvas" in self.models:
            drawn = canvas.predict(self.models["canvas"], image, self.settings)
            out["canvas"] = self.settings.label_set.region_probabilities(drawn)
        return {stage: out[stage] for stage in self.models}

    def masks(self, volume: Volume) -> dict[str, np.ndarray]:
        """Class maps of every stage on the scan's own grid, uint8 (i, j, k)."""
        first = self.models["ssl"]
        image, grid = prepare(volume, self.settings, first.spacing)
        return {s: grid.regions_to_native(r, self.settings.label_set) for s, r in self.regions(image).items()}


def segment_files(
    model: str, source: Path, target: Path, paths: Paths, settings: Settings, report: ProgressCallback = no_progress
) -> tuple[dict[str, str], dict[str, str]]:
    """Segment a scan, or a folder of scans, with the published models.

    Args:
        model: ``ssl``, ``sam`` (its redrawing of the SSL mask), ``adapter`` or ``aslseg`` (all in turn).
        source: Image file or folder.
        target: Label file, or the folder for ``<id>.nii.gz``.
        paths: Where the models are published.
        settings: Labels, window and prompts.
        report: Told after each scan.

    Returns:
        Case to written file, and case to the reason why it was skipped.

    Raises:
        NoModelError: A model that is needed is not published.
    """
    kinds = KINDS[: KINDS.index("adapter" if model == "aslseg" else model) + 1]
    found = {kind: find_published(paths, kind, check=True) for kind in kinds}
    for kind, entry in found.items():
        if entry is None:
            raise NoModelError(f"no {kind} model is published in {paths.models}; run `aslseg round` first")
    cascade = Cascade.load({kind: entry.path for kind, entry in found.items() if entry}, settings)
    scans = sorted(p for p in source.iterdir() if extension(p)) if source.is_dir() else [source]
    single = not source.is_dir() and extension(target) is not None
    written, skipped = {}, {}
    for number, scan in enumerate(scans, 1):
        out = target if single else target / f"{case_id(scan)}.nii.gz"
        try:
            volume = read_image(scan, settings.max_voxels)
            write_label(out, cascade.masks(volume)[kinds[-1]], volume.affine)
            written[case_id(scan)] = str(out)
        except BadImageError as error:
            skipped[case_id(scan)] = str(error)
        report(number, len(scans))
    return written, skipped
