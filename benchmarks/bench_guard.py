"""What the comparison of shape and place with human labels is worth on real labels (docs/science.md §6.5).

    python benchmarks/bench_guard.py --data ../shared/data
    python benchmarks/bench_guard.py --data ../shared/data --repeats 40 --seed 1

Of the left atria (la) and the livers (lits_tumour), N labels are drawn at random, several times. All other scans, of
other patients, have their true mask and wrong ones judged. Printed are means over the draws: the part of the N labels
that the others among them reject, the part of the draws in which the guard may veto and, over these draws only, the
part of the true masks that it rejects and of each kind of wrong mask. Scans are thinned to a third in plane (la: along
every axis) without interpolation.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from aslseg.agreement import plausibility
from aslseg.types import Labels

SIZES = (4, 8, 12, 16, 32)


@dataclass(frozen=True)
class Scan:
    """A scan with its label, thinned.

    Attributes:
        patient: Whose it is.
        image: (i, j, k) float32 in 0..1.
        mask: (i, j, k) bool, the organ with everything in it.
        spacing: mm.
    """

    patient: str
    image: np.ndarray
    mask: np.ndarray
    spacing: np.ndarray

    def features(self, mask: np.ndarray) -> np.ndarray:
        """Features of a mask on this scan."""
        labels = Labels.parse("organ")
        return plausibility.case_features(self.image, mask[None], [float(s) for s in self.spacing], labels)["organ"]


def scans(folder: Path) -> Iterator[Scan]:
    """The scans of ``la`` or ``lits_tumour``."""
    table = folder / "patients.csv"
    with table.open() if table.exists() else (folder / "train.txt").open() as file:
        patients = {r["case"]: r["patient"] for r in csv.DictReader(file)} if table.exists() else {}
    step = np.array([3, 3, 1 if patients else 3])
    for path in sorted((folder / "images").iterdir()):
        image, label = nib.load(path), nib.load(folder / "labels" / path.name)
        thin = tuple(slice(None, None, int(s)) for s in step)
        values = np.asarray(image.dataobj)[thin].astype(np.float32)
        low, high = (-160.0, 240.0) if patients else np.percentile(values, [0.5, 99.5])
        case = path.name.split(".")[0]
        spacing = np.array(image.header.get_zooms()[:3]) * step
        scaled = np.clip((values - low) / (high - low), 0, 1)
        yield Scan(patients.get(case, case), scaled, np.asarray(label.dataobj)[thin] > 0, spacing)


def wrong(scan: Scan, other: Scan) -> Iterator[tuple[str, np.ndarray]]:
    """Masks that two networks could agree on."""
    mask = scan.mask
    for axis, name in enumerate("xy"):
        for mm in (20, 40):
            yield f"shifted {mm} mm along {name}", np.roll(mask, round(mm / scan.spacing[axis]), axis)
    for axis, name in enumerate(("left-right", "front-back", "up-down")):
        yield f"flipped {name}", np.flip(mask, axis)
    yield "eroded by a voxel", ndimage.binary_erosion(mask)
    yield "dilated by a voxel", ndimage.binary_dilation(mask)
    pasted = np.zeros_like(mask)
    both = tuple(slice(0, min(a, b)) for a, b in zip(mask.shape, other.mask.shape, strict=True))
    pasted[both] = other.mask[both]
    yield "of another scan", pasted


def measure(folder: Path, repeats: int, seed: int) -> None:
    """Write the table of a data set."""
    rng = np.random.default_rng(seed)
    found = list(scans(folder))
    true = np.array([scan.features(scan.mask) for scan in found])
    others = [found[int(rng.integers(len(found)))] for _ in found]
    bad = [
        {name: scan.features(mask) for name, mask in wrong(scan, other) if mask.any()}
        for scan, other in zip(found, others, strict=True)
    ]
    whose = [scan.patient for scan in found]
    whole = plausibility.learned(true, whose).rejected
    sys.stdout.write(f"{folder.name}: {len(found)} labels; each by those of all other patients: {whole:.1%} rejected\n")
    for size in (n for n in SIZES if n <= len(found) - 4):
        rejected, trusted, false = [], [], []
        caught: dict[str, list[bool]] = {name: [] for name in bad[0]}
        for _ in range(repeats):
            chosen = rng.choice(len(found), size, replace=False)
            shapes = plausibility.learned(true[chosen], [whose[n] for n in chosen])
            rejected.append(shapes.rejected)
            trusted.append(shapes.trusted)
            seen = {whose[n] for n in chosen}
            for n in (n for n in range(len(found)) if shapes.trusted and whose[n] not in seen):
                false.append(shapes.excess(true[n]) > 1)
                for name, values in bad[n].items():
                    caught[name].append(shapes.excess(values) > 1)
        line = f"  {size} labels: rejected by each other {np.mean(rejected):.1%}, may veto in {np.mean(trusted):.0%}"
        if false:
            line += f", true masks rejected {np.mean(false):.1%}; caught: "
            line += ", ".join(f"{name} {np.mean(values):.0%}" for name, values in caught.items())
        sys.stdout.write(f"{line}\n")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with la and lits_tumour")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in ("la", "lits_tumour"):
        measure(arguments.data / name, arguments.repeats, arguments.seed)


if __name__ == "__main__":
    main()
