"""How often a night would refuse or warn without a reason, and what it catches, on real scans with their labels.

Labelled sets are drawn at random, and the other scans of the folder are the pool. Refusals: true scans that the check
of whole scans (:mod:`aslseg.cases.scan_likeness`) would not promote, and aliens made from one of them that it, or the
check of intensities, catches. Drift: warnings where the "promoted" masks are true labels of other scans drawn at
random, and where they are grown or cut by a voxel.

    python benchmarks/bench_aliens.py --data ../shared/data/la --modality mr
    python benchmarks/bench_aliens.py --data ../shared/data/lits_tumour
"""

from __future__ import annotations

import argparse
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from alien_scans import ALIENS, alien
from aslseg.cases.intensity_check import unusual_intensities
from aslseg.cases.patients import read_patients
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.scan_likeness import unlike_labelled
from aslseg.rounds.promotion.drift import compare_groups, in_words
from aslseg.settings import Settings
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.intensity import normalise
from aslseg.volume.io import case_id, read_image
from realdata_la import averaged, averaged_affine

logger = logging.getLogger("bench_aliens")
LABELLED = (2, 4, 8)
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda mask: mask,
    "grown by a voxel": ndimage.binary_dilation,
    "cut by a voxel": ndimage.binary_erosion,
}


class Scan:
    """A scan, averaged over cubes of ``edge`` voxels, and what its label says.

    Attributes:
        case: On the working grid, without a label.
        volume: HU or the scanner's units.
        label: Class map (i, j, k) of 0 and 1 (everything that is labelled).
        features: Volume and median intensity of the label by kind of change, as drift compares them.
    """

    def __init__(self, path: Path, label: Path, patient: str, edge: int, settings: Settings) -> None:
        read = read_image(path)
        self.volume = Volume(averaged(read.array, edge).astype(np.float32), averaged_affine(read.affine, edge))
        self.label = (averaged(read_image(label).array > 0, edge) >= 0.5).astype(np.uint8)
        self.case = prepared(case_id(path), patient, self.volume, settings)
        image, voxel = normalise(self.volume.array, settings), math.prod(self.volume.spacing) / 1000
        self.features = {}
        for kind, change in CHANGES.items():
            mask = change(self.label > 0)
            self.features[kind] = {
                "label": {"volume": float(mask.sum()) * voxel, "intensity": float(np.median(image[mask]))}
            }


def prepared(name: str, patient: str, volume: Volume, settings: Settings) -> Prepared:
    """A scan on its own grid in RAS order."""
    grid = Grid.of(volume, None)
    return Prepared(name, patient, grid.to_working(normalise(volume.array, settings)), grid)


def refusals(scans: list[Scan], labelled: int, draws: int, settings: Settings) -> dict[str, float]:
    """Share of true scans, and of aliens by kind, that are refused."""
    rng, found = np.random.default_rng(labelled), defaultdict(list)
    for _ in range(draws):
        order = rng.permutation(len(scans))
        known, pool = ([scans[n] for n in part] for part in (order[:labelled], order[labelled:]))
        cases, others = [s.case for s in known], [s.case for s in pool]
        refused = unlike_labelled(cases, others)
        found["true scans"].append(len(refused) / len(others))
        for kind in ALIENS:
            made = prepared("alien", "alien", alien(kind, pool[-1].volume, pool[-1].label, 1), settings)
            caught = unlike_labelled(cases, [*others[:-1], made]) or {}
            caught |= unusual_intensities(cases, [made], settings, ())[0]
            found[kind].append(float("alien" in caught))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def alarms(scans: list[Scan], labelled: int, draws: int) -> dict[str, float]:
    """Share of nights with a drift warning, where true masks of twelve other scans are "promoted", or changed ones."""
    rng, found = np.random.default_rng(labelled), defaultdict(list)
    for _ in range(draws):
        order = rng.permutation(len(scans))
        human = [scans[n].features["as they are"] for n in order[:labelled]]
        for kind in CHANGES:
            promoted = [scans[n].features[kind] for n in order[labelled : labelled + 12]]
            found[kind].append(bool(in_words(compare_groups(human, promoted))))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images and labels")
    parser.add_argument("--modality", default="ct", choices=("ct", "mr"))
    parser.add_argument("--edge", type=int, default=3, help="voxels are averaged over cubes of this edge")
    parser.add_argument("--draws", type=int, default=30, help="labelled sets for each number of labels")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings(modality=arguments.modality)
    images = {case_id(p): p for p in sorted((arguments.data / "images").glob("*.nii.gz"))}
    labels = {case_id(p): p for p in sorted((arguments.data / "labels").glob("*.nii.gz"))}
    patients = read_patients(arguments.data / "patients.csv", images).patients
    chosen = [c for c in images if c in labels]
    scans = [Scan(images[c], labels[c], patients.get(c, c), arguments.edge, settings) for c in chosen]
    logger.info("%d scans of %s\n", len(scans), arguments.data.name)
    rows = {n: refusals(scans, n, arguments.draws, settings) for n in LABELLED if n < len(scans) - 4}
    logger.info("| labelled | %s |", " | ".join(next(iter(rows.values()))))
    for count, row in rows.items():
        logger.info("| %d | %s |", count, " | ".join(f"{value:.3f}" for value in row.values()))
    logger.info("\n| labelled | drift warnings: %s |", " | ".join(CHANGES))
    for count in (c for c in (4, 8) if c + 4 <= len(scans)):
        row = alarms(scans, count, 40 * arguments.draws)
        logger.info("| %d | %s |", count, " | ".join(f"{value:.3f}" for value in row.values()))


if __name__ == "__main__":
    main()
