"""The scans of lits_tumour on the working grid, split by patient."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aslseg.cases.prepare import PreparedStore, Spacing, working_spacing
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import Case
from aslseg.settings import Settings
from aslseg.volume.io import read_image, read_label
from lits_scoring import fold_patients, known_patients, known_scans, patients

LITS = {"labels": "liver,tumour", "nested": "tumour:liver", "modality": "ct"}
"""Settings of all trainings."""


@dataclass(frozen=True)
class Split:
    """Scans on the working grid.

    Attributes:
        labelled: Learned from.
        rest: Other scans of the labelled set's patients: unlabelled.
        test: Scans of the held-out patients.
        spacing: Of the working grid.
    """

    labelled: list[Prepared]
    rest: list[Prepared]
    test: list[Prepared]
    spacing: Spacing


def split(arguments: argparse.Namespace, settings: Settings, labels_of_all: bool = True) -> Split:
    """The scans that the arguments name.

    Args:
        arguments: ``data``, ``cache``, ``rotation``, ``fold``, ``labelled`` and ``tumours`` of bench_lits.py.
        settings: Labels, window and size of the working grid.
        labels_of_all: Whether scans that are not learned from get their label too; False opens none of their files.
    """
    files, who = sources(arguments.data), patients(arguments.data)
    if arguments.fold:
        number, count = map(int, arguments.fold.split("/"))
        held = fold_patients(number, count, arguments.data)
        chosen = labelled = [name for name, patient in who.items() if patient not in held]
    else:
        held = set(who.values()) - known_patients(arguments.rotation, arguments.data)
        chosen = known_scans(arguments.rotation)
        labelled = chosen[: arguments.labelled]
    spacing = working_spacing([read_image(files[name].image) for name in chosen], settings)
    store = PreparedStore(arguments.cache, settings, spacing)
    scans = [case if labels_of_all or name in labelled else replace(case, label=None) for name, case in files.items()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        cases = dict(zip(files, pool.map(store.load, scans), strict=True))
    rest = [c for n, c in cases.items() if c.patient not in held and n not in labelled]
    test = [c for c in cases.values() if c.patient in held]
    return Split([taught(cases[n], arguments.tumours) for n in labelled], rest, test, spacing)


def sources(data: Path) -> dict[str, Case]:
    """The files of each scan, by its id."""

    def file(folder: str, name: str) -> Path:
        packed = data / folder / f"{name}.nii.gz"
        return packed if packed.exists() else packed.with_suffix("")

    return {
        name: Case(name, file("images", name), patient, "train", file("labels", name))
        for name, patient in patients(data).items()
    }


def true_label(source: Case, case: Prepared, settings: Settings) -> np.ndarray:
    """The true class map (i, j, k) uint8 of a scan on its working grid, read from its file.

    Raises:
        BadLabelError: The file cannot be read as a label of the scan.
    """
    assert source.label is not None  # noqa: S101 - every scan of the folder has one
    label = read_label(source.label, read_image(source.image), settings.label_set, settings.max_voxels)
    return case.grid.label_to_working(label, settings.label_set)


def taught(case: Prepared, tumours: str) -> Prepared:
    """A labelled case with what is said of its tumours: all, that they are liver, or nothing."""
    label = np.asarray(case.label)
    if tumours == "liver":
        return replace(case, label=np.minimum(label, 1))
    if tumours == "unknown":
        return replace(case, label=np.minimum(label, 1), voxel_weight=(label < 2).astype(np.float16))
    return case
