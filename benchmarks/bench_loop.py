"""What the loop's masks are worth at equal compute: left atria of ../shared/data/la, few labels, several labelled sets.

Of the first 48 scans of train.txt, L are labelled (set N: lines L(N - 1) + 1 to LN) and the others are not. Lines 49 to
64 are the scans to choose by; lines 65 to 80, the held-out ones, decide nothing. Set N has a seed of its own. An arm is
a training of a multiple of ``--steps`` steps that may learn masks of the unlabelled scans, a mean of several models, or
(``round ...``) a whole round on a studies folder with the settings' defaults and the small SAM.

    python benchmarks/bench_loop.py --edge 2 --labelled 4 --sets 1,2,3 --out work/loop
    python benchmarks/bench_loop.py --arms ssl,student,today --sets 1 --out work/loop
    python benchmarks/bench_loop.py --arms none --out work/loop --pool other/loop     # only the tables
    python benchmarks/bench_loop.py --arms ssl,supervised --pairs pairs.csv --out work/loop   # for bench_promise.py
    python benchmarks/bench_loop.py --edge 2 --reduce work/la2         # the scans, averaged; to be used as --data

Any number of processes may share one --out: an arm that another one computes is left to it, and finished arms are not
computed again. A killed training goes on from its checkpoint. OUT/edgeE_labelsL/setN/ARM/result.json has the scores;
models and maps are beside it or under --work. OUT/table.md compares arms with the SSL model alone, trained for as long
as the whole loop (:mod:`loop_table`).
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from filelock import FileLock, Timeout

from aslseg.cases.prepare import prepare
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.files import atomic_file, write_json
from aslseg.settings import Settings, load_settings
from aslseg.settings.model import MOST_FOLDS
from aslseg.ssl import engine
from aslseg.ssl.predict import load
from aslseg.types import Volume
from aslseg.volume.io import read_image, write_image, write_label
from loop_arms import MAIN, Arm, arms
from loop_rounds import native_label, run_one_round
from loop_table import tables
from realdata_la import averaged, averaged_affine

logger = logging.getLogger("bench_loop")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "la"
TRAINED = 48
PATCHES = {2: "64,64,32", 3: "48,48,32"}
UNCERTAIN = 0.1
WAIT = 2.0
"""Seconds after which it is looked again whether another process has finished an arm."""
CONF = {
    "labels": "atrium",
    "nested": "",
    "modality": "mr",
    "spacing": "native",
    "network": "vnet_small",
}


class Bench:
    """The arms of one labelled set.

    Args:
        scans: Of the whole list.
        folders: Of the set: where results are, and where models and maps are.
        labelled: Number of labelled scans.
        number: The labelled set, from 1.
        steps: Training steps of an arm.
        conf: Settings of all trainings.
    """

    def __init__(
        self,
        scans: Sequence[tuple[Volume, Prepared]],
        folders: tuple[Path, Path],
        labelled: int,
        number: int,
        steps: int,
        conf: dict[str, str],
    ) -> None:
        known = range(labelled * (number - 1), labelled * number)
        if known.stop > TRAINED:
            raise SystemExit(f"set {number} of {labelled} labels ends behind line {TRAINED}; ask for a smaller one")
        self.volumes = {case.id: volume for volume, case in scans}
        cases = [case for _, case in scans]
        self.labelled = [cases[n] for n in known]
        self.unlabelled = [c for n, c in enumerate(cases[:TRAINED]) if n not in known]
        self.scored = cases[TRAINED:]
        (self.folder, self.work), self.steps, self.arms = folders, steps, arms(labelled)
        settings = load_settings(conf, env={})[0]
        self.conf = conf | {"seed": str(settings.seed + number - 1)}
        self.settings = settings.model_copy(update={"seed": settings.seed + number - 1})
        self.shared = {need for arm in self.arms.values() for need in arm.needs}

    def order(self, wanted: Sequence[str]) -> list[str]:
        """The arms that are not done, each after those that it needs."""
        found: dict[str, None] = {}

        def add(name: str) -> None:
            for need in self.arms[name].needs:
                if not self.usable(need):
                    add(need)
            found[name] = None

        for name in wanted:
            if not self.done(name):
                add(name)
        return list(found)

    def done(self, name: str) -> bool:
        """Whether an arm is scored."""
        return (self.folder / name / "result.json").exists()

    def usable(self, name: str) -> bool:
        """Whether other arms can use one's masks and model."""
        return self.done(name) and (self.work / name / "maps.npz").exists()

    def compute(self, name: str) -> bool:
        """Compute and score an arm, unless another process does so; returns whether it was this one."""
        lock = FileLock(self.work / name / "lock")
        (self.work / name).mkdir(parents=True, exist_ok=True)
        try:
            with lock.acquire(timeout=0):
                if not (self.usable(name) if name in self.shared else self.done(name)):
                    self._compute(name, self.arms[name])
                return True
        except Timeout:
            return False

    def _compute(self, name: str, arm: Arm) -> None:
        started = time.monotonic()
        maps, notes = self.average(arm) if arm.members else self.train(name, arm)
        if name in self.shared:
            self.keep(name, maps)
        scored = {c.id: score(maps, c) for c in self.scored}
        out = [] if arm.fold is None else self.part(arm.fold)
        free = [c for c in self.unlabelled if c.id in maps]
        result = {
            "dice": scored,
            "unlabelled": float(np.mean([score(maps, c) for c in free])) if free else None,
            "left_out": float(np.mean([score(maps, c) for c in out])) if out else None,
            "units": self.units(name),
            "unit": self.steps,
            "steps": round(arm.steps * self.steps),
            "seconds": time.monotonic() - started,
        }
        write_json(self.folder / name / "result.json", result | notes)
        logger.info("%s %s: %.3f", self.folder.name, name, np.mean(list(scored.values())))

    def units(self, name: str) -> float:
        """Steps of an arm and of all that it needs, in multiples of ``--steps``."""
        found: set[str] = set()

        def add(arm: str) -> None:
            found.add(arm)
            for need in self.arms[arm].needs:
                add(need)

        add(name)
        return sum(self.arms[arm].steps for arm in found if not self.arms[arm].members)

    def part(self, fold: int) -> list[Prepared]:
        """The labelled scans of a fold."""
        return self.labelled[fold :: min(MOST_FOLDS, len(self.labelled))]

    def train(self, name: str, arm: Arm) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Train an arm's network; what it says of the scans, and notes."""
        if arm.recipe:
            scans = [(c, self.volumes[c.id]) for c in (*self.labelled, *self.unlabelled)]
            known = {c.id for c in self.labelled}
            model, notes = run_one_round(self.work / name, scans, known, self.conf, arm.recipe, arm.steps, self.steps)
        else:
            model, notes = self._trained(name, arm)
        cases = [*self.labelled, *self.unlabelled, *self.scored] if name in self.shared else self.scored
        cases = [*cases, *(self.part(arm.fold) if arm.fold is not None and name not in self.shared else ())]
        network = load(model, self.settings)
        return {c.id: network.predict(c.image)[1].astype(np.float16) for c in cases}, notes

    def _trained(self, name: str, arm: Arm) -> tuple[Path, dict[str, Any]]:
        learned, about = self.learned(arm)
        left_out = {c.id for c in (self.part(arm.fold) if arm.fold is not None else ())}
        out = self.work / name / "ssl.safetensors"
        trained = engine.train(
            [*(c for c in self.labelled if c.id not in left_out), *learned],
            self.unlabelled,
            self.settings.model_copy(update={"ssl_method": arm.method}),
            out,
            iterations=round(arm.steps * self.steps),
            spacing=None,
            init=self.work / arm.start / "ssl.safetensors" if arm.start else None,
            reuse=True,
        )
        return out, {"seconds_per_step": trained["seconds_per_step"], **about}

    def average(self, arm: Arm) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The mean of the members' probabilities, and notes."""
        each = [self.maps(member) for member in arm.members]
        return {case: np.mean([m[case] for m in each], 0) for case in each[0]}, {"members": list(arm.members)}

    def learned(self, arm: Arm) -> tuple[list[Prepared], dict[str, Any]]:
        """The unlabelled scans with the masks and weights that an arm learns, and how good the masks are."""
        if not arm.masks:
            return [], {}
        agreement, differ = self.agreement() if {"ssl", "supervised"} <= {*arm.needs} else ({}, {})
        p = {c.id: np.asarray(c.label, np.float32) for c in self.unlabelled} if arm.masks == "true" else None
        p = self.maps(arm.masks) if p is None else p
        order = sorted(self.unlabelled, key=lambda c: -agreement.get(c.id, 0))
        found = []
        for case in order[: round(arm.fraction * len(order))]:
            q = p[case.id]
            weight = np.maximum(UNCERTAIN, np.abs(2 * q - 1)) if arm.confidence else np.ones_like(q)
            weight = np.where(differ.get(case.id, False), arm.disagreement * weight, weight).astype(np.float16)
            found.append(replace(case, label=(q > 0.5).astype(np.uint8), weight=arm.weight, voxel_weight=weight))
        everything = {c.id: score(p, c) for c in self.unlabelled}
        return found, {"learned": {c.id: everything[c.id] for c in found}, "masks": everything, "agreement": agreement}

    def agreement(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Dice between the masks of ``ssl`` and ``supervised`` on the unlabelled scans, and where they differ."""
        first, second = (self.maps(name) for name in ("ssl", "supervised"))
        masks = {c.id: (first[c.id] > 0.5, second[c.id] > 0.5) for c in self.unlabelled}
        return {c: dice(a, b) or 0.0 for c, (a, b) in masks.items()}, {c: a != b for c, (a, b) in masks.items()}

    def maps(self, name: str) -> dict[str, np.ndarray]:
        """Probability of the atrium (i, j, k) in every scan, by case id."""
        with np.load(self.work / name / "maps.npz") as file:
            return {case: file[case].astype(np.float32) for case in file.files}

    def keep(self, name: str, maps: dict[str, np.ndarray]) -> None:
        """Write what :meth:`maps` reads."""
        with atomic_file(self.work / name / "maps.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{case: p.astype(np.float16) for case, p in maps.items()})


def read_scans(data: Path, edge: int, settings: Settings) -> Iterator[tuple[Volume, Prepared]]:
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
    for volume, case in read_scans(data, edge, settings):
        write_image(out / "images" / f"{case.id}.nii.gz", volume)
        write_label(out / "labels" / f"{case.id}.nii.gz", native_label(case), volume.affine)
        names.append(case.id)
    (out / "train.txt").write_text("\n".join(names) + "\n")
    (out / "edge.txt").write_text(f"{edge}\n")


def score(maps: dict[str, np.ndarray], case: Prepared) -> float:
    """Dice of an arm's mask of a scan; 0 where both are empty, which no scan of these is."""
    return dice(maps[case.id] > 0.5, np.asarray(case.label)) or 0.0


def work_through(benches: Sequence[Bench], wanted: Sequence[str]) -> None:
    """Compute what is not done, beside other processes that do the same.

    An arm waits until those that it needs are done; an arm that another process computes is left to it.
    """
    todo = [(bench, name) for bench in benches for name in bench.order([w for w in wanted if w in bench.arms])]
    while todo:
        left = []
        for bench, name in todo:
            ready = all(bench.usable(need) for need in bench.arms[name].needs)
            if not (ready and bench.compute(name)):
                left.append((bench, name))
        if len(left) == len(todo):
            time.sleep(WAIT)
        todo = left


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("work/loop"), help="results and tables")
    parser.add_argument("--work", type=Path, help="models and maps; by default --out")
    parser.add_argument("--pool", type=Path, nargs="*", default=[], help="more folders of results for the tables")
    parser.add_argument("--edge", type=int, default=3, choices=PATCHES, help="averages over cubes of so many voxels")
    parser.add_argument("--labelled", type=int, default=4, help="number of labelled scans")
    parser.add_argument(
        "--sets", "--seed", default="1", help="labelled sets, each with a seed of its own, such as 1,2,3"
    )
    parser.add_argument("--arms", default="main", help="names; main; all; none: only the tables")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=Path, help="CSV for agreement of ssl and supervised, and Dice of ssl")
    parser.add_argument("--reduce", type=Path, metavar="DIR", help="write the averaged scans there, and nothing else")
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    conf = CONF | {"patch": PATCHES[arguments.edge]} | dict(pair.split("=", 1) for pair in arguments.conf)
    settings = load_settings(conf, env={})[0]
    if arguments.reduce:
        reduce(arguments.data, arguments.edge, settings, arguments.reduce)
        return
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    known = arms(arguments.labelled)
    named = {"main": MAIN, "all": ",".join(known), "none": ""}.get(arguments.arms, arguments.arms)
    wanted = [name for name in named.split(",") if name in known]
    if wanted:
        scans = list(read_scans(arguments.data, arguments.edge, settings))
        setting = f"edge{arguments.edge}_labels{arguments.labelled}"
        benches = [
            Bench(
                scans,
                (arguments.out / setting / f"set{n}", (arguments.work or arguments.out) / setting / f"set{n}"),
                arguments.labelled,
                n,
                arguments.steps,
                conf,
            )
            for n in map(int, arguments.sets.split(","))
        ]
        work_through(benches, wanted)
        for bench in benches if arguments.pairs else ():
            write_pairs(bench, arguments.pairs)
    found = tables([arguments.out, *arguments.pool])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(found)
    logger.info("\n%s", found)


if __name__ == "__main__":
    main()
