"""The scans of bench_loop.py: left atria, or livers with tumours; each labelled set has scans of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from aslseg.cases.prepare import Spacing, prepare
from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings
from aslseg.ssl.engine import without_label
from aslseg.types import Volume
from aslseg.volume.io import read_image, write_image, write_label
from lits_scoring import known_scans
from lits_split import LITS, sources, split, true_label
from loop_rounds import native_label
from realdata_la import averaged, averaged_affine

TRAINED = 48
"""Atria that are labelled or learned without label; the scans behind them are scored."""
PATCHES = {2: "64,64,32", 3: "48,48,32"}
ATRIA = {
    "labels": "atrium",
    "nested": "",
    "modality": "mr",
    "spacing": "native",
    "network": "vnet_small",
}
LIVERS = LITS


@dataclass(frozen=True)
class ScanSet:
    """The scans of a labelled set on the working grid.

    Attributes:
        labelled: With their labels.
        unlabelled: Learned from, without labels.
        scored: Those whose masks are scored, without labels; they may be unlabelled ones.
        spacing: Of the working grid; None for the scans' own.
        truth: The true class map (i, j, k) uint8 of a scan by its id.
        volumes: As read, by id, for whole rounds; empty: none can be run.
    """

    labelled: list[Prepared]
    unlabelled: list[Prepared]
    scored: list[Prepared]
    spacing: Spacing
    truth: Callable[[str], np.ndarray]
    volumes: dict[str, Volume] = field(default_factory=dict)

    @property
    def predicted(self) -> list[Prepared]:
        """The unlabelled and the scored scans, each once."""
        return list({c.id: c for c in (*self.unlabelled, *self.scored)}.values())


def atria(scans: Sequence[tuple[Volume, Prepared]], labelled: int, number: int) -> ScanSet:
    """A labelled set of atria: lines L(N - 1) + 1 to LN of the list.

    Args:
        scans: Of the whole list, with labels.
        labelled: L.
        number: N, from 1.
    """
    known = range(labelled * (number - 1), labelled * number)
    if known.stop > TRAINED:
        raise SystemExit(f"set {number} of {labelled} labels ends behind line {TRAINED}; ask for a smaller one")
    cases = [case for _, case in scans]
    labels = {case.id: np.asarray(case.label) for case in cases}
    return ScanSet(
        [cases[n] for n in known],
        [without_label(c) for n, c in enumerate(cases[:TRAINED]) if n not in known],
        [without_label(c) for c in cases[TRAINED:]],
        None,
        labels.__getitem__,
        {case.id: volume for volume, case in scans},
    )


def livers(data: Path, labelled: int, number: int, settings: Settings, prepared: Path) -> ScanSet:
    """A labelled set of lits_tumour: the first scans of a rotation of bench_lits.py.

    All other scans are unlabelled. Those of patients without a label are scored too: in ASLseg's use the scans that
    are learned without label are the ones that want masks. Files of their labels are opened by ``truth`` alone.

    Args:
        data: Folder of the scans.
        labelled: Number of labelled scans.
        number: Of the rotation, from 1.
        settings: Labels, window and size of the working grid.
        prepared: Folder for scans on the working grid.
    """
    known = known_scans(number)
    if not 0 < labelled <= len(known):
        raise SystemExit(f"expected 1 to {len(known)} labelled livers, got {labelled}")
    what = {"data": data, "cache": prepared, "rotation": number, "labelled": labelled}
    found = split(argparse.Namespace(**what, fold=None, tumours="labelled"), settings, labels_of_all=False)
    unlabelled = sorted([*found.rest, *found.test], key=lambda c: c.id)
    known_patients = {c.patient for c in found.labelled}
    files, cases = sources(data), {c.id: c for c in (*found.labelled, *unlabelled)}

    @cache
    def truth(case: str) -> np.ndarray:
        return true_label(files[case], cases[case], settings)

    scored = [c for c in unlabelled if c.patient not in known_patients]
    return ScanSet(found.labelled, unlabelled, scored, found.spacing, truth)


def read_atria(data: Path, edge: int, settings: Settings) -> Iterator[tuple[Volume, Prepared]]:
    """All scans of the list, averaged over cubes of ``edge`` voxels, and on the working grid with the true label.

    A folder that ``--reduce`` has written holds averages already.
    """
    reduced = data / "edge.txt"
    if reduced.exists() and int(reduced.read_text()) != edge:
        raise SystemExit(f"{data} holds averages over {reduced.read_text().strip()} voxels; give that as --edge")
    for name in filter(None, (data / "train.txt").read_text().split()):
        volume = read_image(data / "images" / f"{name}.nii.gz")
        mask = read_image(data / "labels" / f"{name}.nii.gz").array
        label = (mask > 0).astype(np.uint8)
        if not reduced.exists():
            # sums, not means: they are whole numbers, and grey values of MR have no unit
            sums = edge**3 * averaged(volume.array, edge)
            volume = Volume(sums.astype(np.float32), averaged_affine(volume.affine, edge))
            label = (averaged(mask > 0, edge) >= 0.5).astype(np.uint8)
        image, grid = prepare(volume, settings, None)
        yield volume, Prepared(name, name, image, grid, grid.label_to_working(label, settings.label_set))


def reduce(data: Path, edge: int, settings: Settings, out: Path) -> None:
    """Write the averaged scans and labels as a data folder, an eighth (edge 2) of the size."""
    names = []
    for volume, case in read_atria(data, edge, settings):
        write_image(out / "images" / f"{case.id}.nii.gz", volume)
        write_label(out / "labels" / f"{case.id}.nii.gz", native_label(case), volume.affine)
        names.append(case.id)
    (out / "train.txt").write_text("\n".join(names) + "\n")
    (out / "edge.txt").write_text(f"{edge}\n")


def with_truth(scans: ScanSet, cases: Sequence[Prepared]) -> list[Prepared]:
    """Cases with their true labels."""
    return [replace(case, label=scans.truth(case.id)) for case in cases]
