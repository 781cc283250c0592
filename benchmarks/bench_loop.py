"""What a round's retraining gains, one factor at a time: left atria of ../shared/data/la at a third of the resolution.

Of the first 48 scans of train.txt, 4 are labelled (set N: lines 4N - 3 to 4N) and 44 are not. Lines 49 to 64 are the
scans to choose by; lines 65 to 80, the held-out ones, decide nothing. Every arm is one training of ``--steps`` steps
(a multiple of it for the controls) and learns from the 4 labels and, if it is a student, from masks of the 44.

    python benchmarks/bench_loop.py --sets 1,2,3 --out work/loop
    python benchmarks/bench_loop.py --arms ssl,student,today --sets 1 --out work/loop
    python benchmarks/bench_loop.py --sets 1,2,3 --arms none --out work/loop      # only the table
    python benchmarks/bench_loop.py --arms ssl,supervised --pairs pairs.csv --out work/loop   # for bench_promise.py

Each arm writes result.json into OUT/setN/ARM; finished arms are not computed again, and a killed training goes on from
its checkpoint. OUT/table.md compares the arms with ``ssl``: two-sided Wilcoxon test of the scans' means over the sets.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from scipy import stats

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.files import atomic_file, write_json
from aslseg.settings import Settings, load_settings
from aslseg.ssl import engine
from aslseg.ssl.predict import load
from aslseg.types import Volume
from aslseg.volume.geometry import Grid
from aslseg.volume.intensity import normalise
from aslseg.volume.io import read_image
from realdata_la import averaged, averaged_affine

logger = logging.getLogger("bench_loop")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "la"
LABELLED, TRAINED, CHOSEN_BY = 4, 48, 64
EDGE = 3
UNCERTAIN, DISAGREEMENT = 0.1, 0.3
CONF = {
    "labels": "atrium",
    "nested": "",
    "modality": "mr",
    "spacing": "native",
    "network": "vnet_small",
    "patch": "48,48,32",
}


@dataclass(frozen=True)
class Arm:
    """A training, or a mean of several models' probabilities.

    Attributes:
        method: SSL method.
        steps: Times ``--steps``.
        masks: Arm whose masks of the unlabelled scans it learns; ``true`` their true labels; empty: none.
        start: Arm from whose model it goes on; empty: random weights.
        confidence: Whether a voxel of a mask weighs max(0.1, |2p - 1|), or 1.
        disagreement: Weight of voxels on which the arms ``ssl`` and ``supervised`` disagree.
        weight: Weight of a scan with such a mask.
        fraction: Part of the scans that is learned: those on which ``ssl`` and ``supervised`` agree best.
        fold: The labelled scan that is left out, from 0; None: none is.
        members: Arms whose mean it is.
    """

    method: str = "supervised"
    steps: float = 1
    masks: str = ""
    start: str = ""
    confidence: bool = True
    disagreement: float = 1
    weight: float = 1
    fraction: float = 1
    fold: int | None = None
    members: tuple[str, ...] = ()


STUDENT = Arm(masks="ssl")
TODAY = Arm("bcp_mt", 0.75, "ssl", "ssl", confidence=False, disagreement=DISAGREEMENT, weight=0.5, fraction=0.5)
FOLDS = tuple(f"fold {n + 1}" for n in range(LABELLED))
ARMS = {
    "supervised": Arm(),
    "ssl": Arm("bcp_mt"),
    "student": STUDENT,
    "today": TODAY,
    "ssl going on without masks": Arm("bcp_mt", 0.75, start="ssl"),
    "student going on": replace(STUDENT, start="ssl"),
    "student hard masks": replace(STUDENT, confidence=False),
    "student agreed half": replace(STUDENT, fraction=0.5),
    "student case weight 0.5": replace(STUDENT, weight=0.5),
    "student bcp_mt": replace(STUDENT, method="bcp_mt"),
    "student disagreement 0.3": replace(STUDENT, disagreement=DISAGREEMENT),
    "today from scratch": replace(TODAY, start="", steps=1),
    "today with confidence": replace(TODAY, confidence=True),
    "today all scans": replace(TODAY, fraction=1),
    "ssl for twice the steps": Arm("bcp_mt", 2),
    "true labels": replace(STUDENT, masks="true"),
    **{name: Arm("bcp_mt", fold=n) for n, name in enumerate(FOLDS)},
    "ensemble": Arm(members=("ssl", *FOLDS)),
    "student of the ensemble": replace(STUDENT, masks="ensemble"),
    "student of the student": replace(STUDENT, masks="student"),
    "student for twice the steps": replace(STUDENT, steps=2),
}


class Bench:
    """The arms of one labelled set.

    Args:
        data: Folder with train.txt, images and labels.
        out: Where the set's folder is made.
        number: The labelled set, from 1.
        steps: Training steps of an arm.
        settings: Of all trainings.
    """

    def __init__(self, data: Path, out: Path, number: int, steps: int, settings: Settings) -> None:
        names = [n for n in (data / "train.txt").read_text().split() if n]
        cases = [read_case(data, n, settings) for n in names]
        known = range(LABELLED * (number - 1), LABELLED * number)
        self.labelled = [cases[n] for n in known]
        self.unlabelled = [c for n, c in enumerate(cases[:TRAINED]) if n not in known]
        self.scored = cases[TRAINED:]
        self.folder, self.steps, self.settings = out / f"set{number}", steps, settings

    def result(self, name: str) -> dict[str, Any]:
        """The scores of an arm, computed with all that it depends on if they are not there yet."""
        path, arm = self.folder / name / "result.json", ARMS[name]
        if not path.exists():
            started = time.monotonic()
            notes = self.average(name, arm) if arm.members else self.train(name, arm)
            maps = self.maps(name)
            scored = {c.id: score(maps, c) for c in self.scored}
            result = {
                "dice": scored,
                "unlabelled": float(np.mean([score(maps, c) for c in self.unlabelled])),
                "left_out": None if arm.fold is None else score(maps, self.labelled[arm.fold]),
                "steps": round(arm.steps * self.steps),
                "seconds": time.monotonic() - started,
            }
            write_json(path, result | notes)
            logger.info("%s %s: %.3f", self.folder.name, name, np.mean(list(scored.values())))
        return dict(json.loads(path.read_text()))

    def train(self, name: str, arm: Arm) -> dict[str, Any]:
        """Train an arm's network and keep what it says of all scans."""
        learned = self.learned(arm) if arm.masks else []
        truth = {c.id: c for c in self.unlabelled}
        out = self.folder / name / "ssl.safetensors"
        trained = engine.train(
            [*(c for n, c in enumerate(self.labelled) if n != arm.fold), *learned],
            self.unlabelled,
            self.settings.model_copy(update={"ssl_method": arm.method}),
            out,
            iterations=round(arm.steps * self.steps),
            spacing=None,
            init=self.model(arm.start) if arm.start else None,
            reuse=True,
        )
        model = load(out, self.settings)
        self.keep(name, {c.id: model.predict(c.image)[1] for c in [*self.labelled, *self.unlabelled, *self.scored]})
        masks = {c.id: dice(np.asarray(c.label), np.asarray(truth[c.id].label)) for c in learned}
        return {"seconds_per_step": trained["seconds_per_step"], "learned": masks}

    def average(self, name: str, arm: Arm) -> dict[str, Any]:
        """Keep the mean of the members' probabilities."""
        each = [self.maps(member) for member in arm.members]
        self.keep(name, {case: np.mean([m[case] for m in each], 0) for case in each[0]})
        return {"members": list(arm.members)}

    def learned(self, arm: Arm) -> list[Prepared]:
        """The unlabelled scans with the masks and weights that an arm learns."""
        if arm.masks == "true":
            return [replace(c, voxel_weight=np.ones(c.image.shape, np.float16)) for c in self.unlabelled]
        p, first, second = (self.maps(name) for name in (arm.masks, "ssl", "supervised"))
        differ = {c.id: (first[c.id] > 0.5) != (second[c.id] > 0.5) for c in self.unlabelled}
        agreed = sorted(self.unlabelled, key=lambda c: -(dice(first[c.id] > 0.5, second[c.id] > 0.5) or 0))
        found = []
        for case in agreed[: round(arm.fraction * len(agreed))]:
            q = p[case.id]
            weight = np.maximum(UNCERTAIN, np.abs(2 * q - 1)) if arm.confidence else np.ones_like(q)
            weight = np.where(differ[case.id], arm.disagreement * weight, weight).astype(np.float16)
            found.append(replace(case, label=(q > 0.5).astype(np.uint8), weight=arm.weight, voxel_weight=weight))
        return found

    def maps(self, name: str) -> dict[str, np.ndarray]:
        """Probability of the atrium (i, j, k) in every scan, by case id."""
        path = self.folder / name / "maps.npz"
        if not path.exists():
            self.result(name)
        with np.load(path) as file:
            return {case: file[case].astype(np.float32) for case in file.files}

    def keep(self, name: str, maps: dict[str, np.ndarray]) -> None:
        """Write what :meth:`maps` reads."""
        with atomic_file(self.folder / name / "maps.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{case: p.astype(np.float16) for case, p in maps.items()})

    def model(self, name: str) -> Path:
        """The model file of an arm."""
        self.result(name)
        return self.folder / name / "ssl.safetensors"


def read_case(data: Path, name: str, settings: Settings) -> Prepared:
    """A scan with its true label, averaged over cubes of three voxels."""
    volume = read_image(data / "images" / f"{name}.nii.gz")
    mask = read_image(data / "labels" / f"{name}.nii.gz")
    image = Volume(averaged(volume.array, EDGE).astype(np.float32), averaged_affine(volume.affine, EDGE))
    label = (averaged(mask.array > 0, EDGE) >= 0.5).astype(np.uint8)
    return Prepared(name, name, normalise(image.array, settings), Grid.of(image, None), label)


def score(maps: dict[str, np.ndarray], case: Prepared) -> float:
    """Dice of an arm's mask of a scan; 0 where both are empty, which no scan of these is."""
    return dice(maps[case.id] > 0.5, np.asarray(case.label)) or 0.0


def write_pairs(bench: Bench, path: Path) -> None:
    """Append agreement and Dice of all scans that a set's arms have not learned from to a CSV, by number."""
    first, second = (bench.maps(name) for name in ("ssl", "supervised"))
    new = not path.exists()
    with path.open("a", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("set", "case", "agreement", "dice")] if new else [])
        for number, case in enumerate([*bench.unlabelled, *bench.scored]):
            agreement = dice(first[case.id] > 0.5, second[case.id] > 0.5) or 0.0
            rows.writerow((bench.folder.name, number, round(agreement, 4), round(score(first, case), 4)))


def table(out: Path, sets: Sequence[int]) -> str:
    """The finished arms as Markdown."""
    found = {
        arm: {n: json.loads(p.read_text()) for n in sets if (p := out / f"set{n}" / arm / "result.json").exists()}
        for arm in ARMS
    }
    lines = ["| arm | " + " | ".join(f"set {n}" for n in sets) + " | lines 49-64 | held out | minus `ssl` | p |"]
    lines.append("|---" * (len(sets) + 5) + "|")
    for arm, results in found.items():
        if not results:
            continue
        dices = {n: np.array(list(r["dice"].values())) for n, r in results.items()}
        cells = [f"{dices[n].mean():.3f} ± {dices[n].std(ddof=1):.3f}" if n in dices else "" for n in sets]
        mean = np.mean(list(dices.values()), 0)
        chosen = CHOSEN_BY - TRAINED
        cells += [f"{part.mean():.3f}" for part in (mean[:chosen], mean[chosen:])]
        lines.append(f"| {arm} | " + " | ".join([*cells, *_against(dices, found["ssl"])]) + " |")
    return "\n".join(lines) + "\n"


def _against(dices: dict[int, np.ndarray], ssl: dict[int, Any]) -> list[str]:
    """Difference from ``ssl`` over the sets that both have, and the p of it."""
    pairs = [(d, np.array(list(ssl[n]["dice"].values()))) for n, d in dices.items() if n in ssl]
    if not pairs:
        return ["", ""]
    ours, theirs = np.mean(pairs, 0)
    p = 1.0 if (ours == theirs).all() else stats.wilcoxon(ours, theirs).pvalue
    return [f"{(ours - theirs).mean():+.3f} ({len(pairs)})", f"{p:.3g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("work/loop"))
    parser.add_argument("--sets", default="1", help="labelled sets, such as 1,2,3")
    parser.add_argument("--arms", default=",".join(ARMS), help="in this order; none: only the table")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=Path, help="CSV for agreement of ssl and supervised, and Dice of ssl")
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = load_settings(CONF | dict(pair.split("=", 1) for pair in arguments.conf), env={})[0]
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    sets = [int(n) for n in arguments.sets.split(",")]
    for number in sets if arguments.arms != "none" else ():
        bench = Bench(arguments.data, arguments.out, number, arguments.steps, settings)
        for name in arguments.arms.split(","):
            bench.result(name)
            (arguments.out / "table.md").write_text(table(arguments.out, sets))
        if arguments.pairs:
            write_pairs(bench, arguments.pairs)
    (arguments.out / "table.md").write_text(table(arguments.out, sets))
    logger.info("\n%s", table(arguments.out, sets))


if __name__ == "__main__":
    main()
