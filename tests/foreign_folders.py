"""Folders as other programs leave them, of tiny scans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from aslseg.cases.importing.plan import Options, Plan, make_plan
from aslseg.cases.importing.transfer import Done, transfer
from aslseg.settings import Paths, Settings, load_settings

SHAPE = (8, 7, 6)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def scan(path: Path, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Path:
    """A scan whose voxels depend on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(-100, 200, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return path


def label(path: Path, *values: float, affine: np.ndarray = AFFINE) -> Path:
    """A label whose slice i = n + 1 holds the n-th value; the rest is background."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(SHAPE, np.float32 if any(v != int(v) for v in values) else np.uint8)
    for n, value in enumerate(values):
        array[n + 1] = value
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


class Import:
    """An import from ``source`` into ``studies``."""

    def __init__(self, folder: Path) -> None:
        self.source, self.studies = folder / "source", folder / "studies"
        self.source.mkdir()

    def plan(self, options: Options = Options(), **conf: str) -> Plan:  # noqa: B008 - frozen
        settings = self.settings(**conf)
        return make_plan(self.source, Paths(settings, self.studies), options, settings)

    def run(self, options: Options = Options(), **conf: str) -> list[Done]:  # noqa: B008 - frozen
        plan = self.plan(options, **conf)
        assert plan.questions == []
        return transfer(plan, self.studies, self.settings(**conf), options.link)

    @staticmethod
    def settings(**conf: str) -> Settings:
        return load_settings({"min_free_gb": "0", **conf}, env={})[0]

    def final(self, case: str) -> list[int]:
        """The values of a label in the studies folder, along the axis on which :func:`label` puts them."""
        image = nib.load(self.studies / "labels" / "final" / f"{case}.nii.gz")
        return [int(v) for v in np.asarray(image.dataobj)[1:5, 0, 0]]
