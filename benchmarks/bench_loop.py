"""What the loop's masks are worth at equal compute: few labels, several labelled sets, each with a seed of its own.

Left atria (../shared/data/la): of the first 48 scans of train.txt, L are labelled (set N: lines L(N - 1) + 1 to LN) and
the others are not. Lines 49 to 64 are the scans to choose by; lines 65 to 80, the held-out ones, decide nothing.

Livers with tumours (a folder with a patients.csv, ../shared/data/lits_tumour): set N is rotation N of bench_lits.py, of
which the first L scans are labelled. All other scans are unlabelled, and those of other patients are scored as well,
since the scans that are learned without label are those that want masks. So a score says how good the masks of these
scans are, not those of scans that come later; and arms that learn true labels are scored on scans that they have
learned, so that they are no ceiling (``bench_lits.py whole --fold`` is one, split by patient).

An arm is a training of a multiple of ``--steps`` steps, in two stages where labels are nested, that may learn masks of
the unlabelled scans; a mean of several models; or (``round ...``, atria only) a whole round on a studies folder with
the settings' defaults and the small SAM. Masks are ranked as a round ranks them. Labels of unlabelled and scored scans
are used for scores alone, after an arm's training; arms named after true labels learn them,
and ``perfect`` selection and weights come from them.
No limits on components are fitted.

    python benchmarks/bench_loop.py --edge 2 --labelled 4 --sets 1,2,3 --out work/loop
    python benchmarks/bench_loop.py --data ../shared/data/lits_tumour --labelled 8 --sets 1,2,3 --out work/loop
    python benchmarks/bench_loop.py --arms ssl,student,today --sets 1 --out work/loop
    python benchmarks/bench_loop.py --conf label_folds=0 --sets 1,2,3 --out work/loop  # without folds
    python benchmarks/bench_loop.py --arms none --out work/loop --pool other/loop     # only the tables
    python benchmarks/bench_loop.py --arms ssl,supervised --pairs pairs.csv --out work/loop   # for bench_promise.py
    python benchmarks/bench_loop.py --edge 2 --reduce work/la2         # the scans, averaged; to be used as --data

Any number of processes may share one --out: an arm that another one computes is left to it, and finished arms are not
computed again. A killed training goes on from its checkpoint. OUT/SETTING/setN/ARM/result.json has the scores, where
SETTING is edgeE_labelsL or lits_labelsL, with _nofolds where label_folds is 0; models and maps are beside it or under
--work. OUT/table.md compares arms with the SSL model alone, trained for as long as the whole loop (:mod:`loop_table`).
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from filelock import FileLock, Timeout

from aslseg.agreement.measures import Agreement, compare
from aslseg.agreement.promotion_rules import PromotionLimits, Verdict, select
from aslseg.cases.prepared_case import Prepared
from aslseg.files import atomic_file, write_json
from aslseg.settings import load_settings
from aslseg.settings.model import MOST_FOLDS
from aslseg.ssl import training
from aslseg.ssl.predict import load
from loop_arms import MAIN, Arm, arms
from loop_data import ATRIA, LIVERS, PATCHES, ScanSet, atria, livers, read_atria, reduce, with_truth
from loop_rounds import run_one_round
from loop_scores import Scores
from loop_table import tables

logger = logging.getLogger("bench_loop")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "la"
UNCERTAIN = 0.1
WAIT = 2.0
"""Seconds after which it is looked again whether another process has finished an arm."""


class Bench:
    """The arms of one labelled set.

    Args:
        scans: Of the set.
        folders: Of the set: where results are, and where models and maps are.
        number: The labelled set, from 1.
        steps: Training steps of an arm.
        conf: Settings of all trainings.
    """

    def __init__(
        self, scans: ScanSet, folders: tuple[Path, Path], number: int, steps: int, conf: dict[str, str]
    ) -> None:
        self.scans, self.labelled, self.unlabelled = scans, scans.labelled, scans.unlabelled
        (self.folder, self.work), self.steps = folders, steps
        settings = load_settings(conf, env={})[0]
        known = arms(len(scans.labelled), settings.label_folds != 0)
        self.arms = {name: arm for name, arm in known.items() if scans.volumes or not arm.recipe}
        self.conf = conf | {"seed": str(settings.seed + number - 1)}
        self.settings = settings.model_copy(update={"seed": settings.seed + number - 1})
        self.labels = settings.label_set
        self.scores = Scores(scans, self.labels)
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
        predicted = time.monotonic()
        masks = {case: self.labels.decode(p) for case, p in maps.items()}
        result = {
            **self.scores.of_scored(masks),
            "unlabelled": self.scores.mean(masks, self.unlabelled),
            "left_out": self.scores.mean(masks, [] if arm.fold is None else self.part(arm.fold)),
            "units": self.units(name),
            "unit": self.steps,
            "steps": round(arm.steps * self.steps),
            **notes,
        }
        if arm.masks:
            given = ((c, self.mask(arm, c)) for c in self.unlabelled)
            names = [c.id for c in self.chosen(arm)]
            result |= self.scores.of_learned(given, names, self.agreements if arm.compares else {})
        ended = time.monotonic()
        write_json(
            self.folder / name / "result.json",
            result | {"seconds": ended - started, "scoring_seconds": ended - predicted},
        )
        logger.info("%s %s: %.3f", self.folder.name, name, np.mean(list(result["dice"].values())))

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
        """Train an arm's network; region probabilities (N, i, j, k) of the scans, and notes."""
        if arm.recipe:
            everything = with_truth(self.scans, [*self.labelled, *self.unlabelled])
            scans = [(c, self.scans.volumes[c.id]) for c in everything]
            known = {c.id for c in self.labelled}
            model, notes = run_one_round(self.work / name, scans, known, self.conf, arm.recipe, arm.steps, self.steps)
        else:
            model, notes = self._trained(name, arm)
        started = time.monotonic()
        cases = self.scans.predicted if name in self.shared else self.scans.scored
        network = load(model, self.settings)
        left_out = [] if arm.fold is None else self.part(arm.fold)
        maps = {c.id: network.regions(np.asarray(c.image)).astype(np.float16) for c in (*cases, *left_out)}
        return maps, notes | {"predicting_seconds": time.monotonic() - started}

    def _trained(self, name: str, arm: Arm) -> tuple[Path, dict[str, Any]]:
        out, iterations = self.work / name / "ssl.safetensors", round(arm.steps * self.steps)
        asked, kept = [repr(arm), iterations, self.conf], out.with_name("trained.json")
        done = json.loads(kept.read_text()) if kept.exists() and out.exists() else {}
        if done.get("asked") != asked:
            left_out = {c.id for c in (self.part(arm.fold) if arm.fold is not None else ())}
            found = training.train(
                [
                    *(c for c in self.labelled if c.id not in left_out),
                    *(self.with_mask(arm, c) for c in self.chosen(arm)),
                ],
                self.unlabelled,
                self.settings.model_copy(update={"ssl_method": arm.method}),
                out,
                iterations=iterations,
                spacing=self.scans.spacing,
                init=self.work / arm.start / "ssl.safetensors" if arm.start else None,
            )
            shown = ("seconds_per_step", "classes", "not_learned")
            done = {"asked": asked, "training_seconds": found["seconds"]} | {key: found[key] for key in shown}
            write_json(kept, done)
        return out, {key: value for key, value in done.items() if key != "asked"}

    def average(self, arm: Arm) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The mean of the members' probabilities, and notes."""
        maps = {
            c.id: np.mean([self.regions(member, c) for member in arm.members], 0).astype(np.float16)
            for c in self.scans.predicted
        }
        return maps, {"members": list(arm.members)}

    def chosen(self, arm: Arm) -> list[Prepared]:
        """The unlabelled scans whose masks an arm learns; where these are a part, ranked as a round ranks them."""
        if arm.fraction == 1:
            return list(self.unlabelled) if arm.masks else []
        limits = PromotionLimits(arm.fraction, empty=self.settings.promote_empty)
        cases = {c.id: c for c in self.unlabelled}
        ranks = self.agreements
        if "selection" in arm.oracle:
            ranks = {name: compare(self.mask(arm, c), self.scans.truth(name), self.labels) for name, c in cases.items()}
        return [cases[name] for name in select(dict.fromkeys(cases, Verdict(True)), ranks, limits)]

    def with_mask(self, arm: Arm, case: Prepared) -> Prepared:
        """An unlabelled scan with the mask and the weights that an arm learns."""
        p = self.given(arm, case)
        weight = np.maximum(UNCERTAIN, np.abs(2 * p - 1).min(0)) if arm.confidence else np.ones_like(p[0])
        if arm.disagreement < 1:
            weight = np.where(np.not_equal(*self.compared(case)), arm.disagreement * weight, weight)
        mask = self.labels.decode(p)
        weight = np.where(np.abs(2 * p - 1).min(0) >= arm.sure, weight, 0)
        if "weights" in arm.oracle:
            weight = np.where(mask == self.scans.truth(case.id), weight, 0)
        return replace(case, label=mask, weight=arm.weight, voxel_weight=weight.astype(np.float16))

    def mask(self, arm: Arm, case: Prepared) -> np.ndarray:
        """The class map that an arm may learn."""
        return self.labels.decode(self.given(arm, case))

    def given(self, arm: Arm, case: Prepared) -> np.ndarray:
        """Region probabilities (N, i, j, k) whose mask an arm may learn; those of the truth are 0 and 1."""
        if arm.masks == "true":
            return self.labels.regions(self.scans.truth(case.id)).astype(np.float32)
        return self.regions(arm.masks, case)

    @cached_property
    def agreements(self) -> dict[str, Agreement]:
        """How well the masks of ``ssl`` and ``supervised`` agree on the unlabelled scans."""
        return {c.id: compare(*self.compared(c), self.labels) for c in self.unlabelled}

    def compared(self, case: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """The class maps of ``ssl`` and ``supervised``."""
        first, second = (self.labels.decode(self.regions(name, case)) for name in ("ssl", "supervised"))
        return first, second

    def regions(self, name: str, case: Prepared) -> np.ndarray:
        """Region probabilities (N, i, j, k) float32 of an arm whose maps are kept."""
        with np.load(self.work / name / "maps.npz") as file:
            p = file[case.id].astype(np.float32)
        # files of one label were written without the first axis once
        return p if p.ndim == 4 else p[None]

    def keep(self, name: str, maps: dict[str, np.ndarray]) -> None:
        """Write what :meth:`regions` reads."""
        with atomic_file(self.work / name / "maps.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **maps)


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
    """Append agreement and Dice of all scans that a set's arms have no label of to a CSV, by number."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("set", "case", "agreement", "dice")] if new else [])
        for number, case in enumerate(bench.scans.predicted):
            first, second = bench.compared(case)
            agreement = compare(first, second, bench.labels).mean
            rows.writerow((bench.folder.name, number, round(agreement, 4), round(bench.scores.score(first, case), 4)))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, default=DATA)
    found.add_argument("--out", type=Path, default=Path("work/loop"), help="results and tables")
    found.add_argument("--work", type=Path, help="models and maps; by default --out")
    found.add_argument("--cache", type=Path, default=Path("work/lits_cache"), help="livers on the working grid")
    found.add_argument("--pool", type=Path, nargs="*", default=[], help="more folders of results for the tables")
    found.add_argument(
        "--edge", type=int, default=3, choices=PATCHES, help="averages over cubes of so many voxels; atria only"
    )
    found.add_argument("--labelled", type=int, default=4, help="number of labelled scans")
    found.add_argument(
        "--sets", "--seed", default="1", help="labelled sets, each with a seed of its own, such as 1,2,3"
    )
    found.add_argument("--arms", default="main", help="names; main; all; none: only the tables")
    found.add_argument("--steps", type=int, default=600)
    found.add_argument("--pairs", type=Path, help="CSV for agreement of ssl and supervised, and Dice of ssl")
    found.add_argument("--reduce", type=Path, metavar="DIR", help="write the averaged atria there, and nothing else")
    found.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    return found


def benches(arguments: argparse.Namespace, conf: dict[str, str]) -> list[Bench]:
    """The labelled sets that the arguments name."""
    settings, count = load_settings(conf, env={})[0], arguments.labelled
    of_livers = has_livers(arguments.data)
    scans = [] if of_livers else list(read_atria(arguments.data, arguments.edge, settings))
    setting = f"lits_labels{count}" if of_livers else f"edge{arguments.edge}_labels{count}"
    # what equal compute is differs: results of the two loops are never mixed
    setting += "_nofolds" if settings.label_folds == 0 else ""
    found = []
    for n in map(int, arguments.sets.split(",")):
        folders = tuple(folder / setting / f"set{n}" for folder in (arguments.out, arguments.work or arguments.out))
        one = livers(arguments.data, count, n, settings, arguments.cache) if of_livers else atria(scans, count, n)
        found.append(Bench(one, folders, n, arguments.steps, conf))
    return found


def has_livers(data: Path) -> bool:
    """Whether a folder holds lits_tumour."""
    return (data / "patients.csv").exists()


def main() -> None:
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    conf = LIVERS if has_livers(arguments.data) else ATRIA | {"patch": PATCHES[arguments.edge]}
    conf = conf | dict(pair.split("=", 1) for pair in arguments.conf)
    settings = load_settings(conf, env={})[0]
    if arguments.reduce and has_livers(arguments.data):
        raise SystemExit(f"--reduce averages atria; {arguments.data} holds livers, which are used as they are")
    if arguments.reduce:
        reduce(arguments.data, arguments.edge, settings, arguments.reduce)
        return
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    known = arms(arguments.labelled, settings.label_folds != 0)
    named = {"main": MAIN, "all": ",".join(known), "none": ""}.get(arguments.arms, arguments.arms)
    wanted = [name for name in named.split(",") if name in known]
    unknown = sorted(set(named.split(",")) - {*known, ""})
    # with one label there are no folds, and arms that need them are left out
    if unknown and arguments.arms != "main":
        raise SystemExit(
            f"no such arm with {arguments.labelled} labels: {', '.join(unknown)}; arms: {', '.join(known)}"
        )
    if wanted:
        found = benches(arguments, conf)
        work_through(found, wanted)
        for bench in found if arguments.pairs else ():
            write_pairs(bench, arguments.pairs)
    table = tables([arguments.out, *arguments.pool])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(table)
    logger.info("\n%s", table)


if __name__ == "__main__":
    main()
