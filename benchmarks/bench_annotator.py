"""The annotator's curve: how good the served model becomes for the labels, and the corrected voxels, that people spend.

After each round a simulated human labels the ``--labels`` scans that a strategy hands out, starting from the mask that
the client shows; the next round learns from them. What is corrected of a scan are the voxels in which its true label
differs from that mask. No audits are drawn, so that every strategy spends the same number of labels. Strategies:

    agreement   lowest agreement first          confirm     highest agreement first
    random      any scan                        foreground  any scan whose mask holds a label that was drawn at random
                                                            (as the foreground-aware random choice that ClaSP PE is
                                                            compared with, by scans, since people label whole scans)

    python benchmarks/bench_annotator.py --out work/annotator --seeds 1,2            # phantoms
    python benchmarks/bench_annotator.py --out work/annotator_la --data ../shared/data/la --pool 48 --first 2 --labels 2

Each strategy and seed has its own folder; several processes may share one --out, and what one of them does the others
leave to it. A killed run goes on where it stopped. OUT/table.md has the curves.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from filelock import FileLock, Timeout

from aslseg.cases.studies import ORIGINAL
from aslseg.files import write_json
from aslseg.serving.strategies import Leases, Random
from aslseg.settings import Settings, load_settings
from aslseg.volume.io import read_image, read_label
from bench_nights import LA, PATCHES, PHANTOM, Plan, Source, Week, atria, phantoms, simulate

logger = logging.getLogger("bench_annotator")

STRATEGIES = ("agreement", "confirm", "random", "foreground")
CONTROL = "random"


class Annotator(Week):
    """A studies folder and a human who labels what a strategy hands out, and how much of each mask was wrong.

    Args:
        out, plan, settings: As for :class:`bench_nights.Week`.
    """

    def __init__(self, out: Path, plan: Plan, settings: Settings) -> None:
        super().__init__(out, plan, settings)
        self.rng = np.random.default_rng(plan.seed)
        if plan.strategy == "random":
            # another draw with each seed
            self.strategy = Random(Leases(), self.scan_checks, self.rng)
        elif plan.strategy == "foreground":
            self.strategy = lambda request, store: {"id": self.foreground(store.get_unlabeled_images())}

    def night(self, number: int) -> dict[str, Any]:
        """As a night of a week, with what the round's model has cost so far."""
        path = self.out / f"spent_{number}.json"
        if not path.exists():
            # a run that was killed after a label of this night's day counts it for the next one
            write_json(path, {"trained_on": len(self.human()), "corrected": sum(self.corrected().values())})
        return json.loads(path.read_text()) | super().night(number)

    def label(self, strategy: str, case: str) -> None:
        """Note how many voxels of the shown mask are wrong, then save the true label."""
        path = self.out / "truth" / f"{case}.nii.gz"
        true = read_label(path, read_image(path), self.labels)
        shown = self.shown(case)
        wrong = int((true > 0).sum() if shown is None else (true != shown).sum())
        write_json(self.out / "corrected.json", self.corrected() | {case: wrong})
        super().label(strategy, case)

    def corrected(self) -> dict[str, int]:
        """Corrected voxels by case."""
        path = self.out / "corrected.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def shown(self, case: str) -> np.ndarray | None:
        """The mask that a client shows, (i, j, k); None without."""
        path = self.studies / "labels" / ORIGINAL / f"{case}.nii.gz"
        return read_label(path, read_image(self.studies / f"{case}.nii.gz"), self.labels) if path.exists() else None

    def foreground(self, cases: Iterable[str]) -> str | None:
        """A random scan whose mask holds a label that is drawn first."""
        masks = {case: self.shown(case) for case in sorted(cases)}
        for n in self.rng.permutation(len(self.labels)):
            value = int(n) + 1
            held = [case for case, mask in masks.items() if mask is not None and (mask == value).any()]
            if held:
                return str(self.rng.choice(held))
        return str(self.rng.choice(list(masks))) if masks else None


def rotated(source: Source, pool: int, by: int) -> Source:
    """The same scans, of which others are the first: each seed has labels of its own."""
    return lambda number: source((number + by) % pool if number < pool else number)


def table(out: Path) -> str:
    """The curves of all strategies, means over the seeds that every one of them has finished."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(out.glob("*/seed*/nights.json")):
        found.setdefault(path.parts[-3], {})[path.parts[-2]] = json.loads(path.read_text())
    seeds = set.intersection(*map(set, found.values())) if found else set()
    nights = min((len(rows) for runs in found.values() for s, rows in runs.items() if s in seeds), default=0)
    head = [
        "strategy",
        "seeds",
        *(f"round {n + 1}" for n in range(nights)),
        f"labels for the Dice that {CONTROL} ends with",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    curves = {
        name: np.array([[_point(row) for row in runs[s][:nights]] for s in sorted(seeds)]).mean(0)
        for name, runs in found.items()
        if nights
    }
    for name, curve in curves.items():
        cells = [f"{dice:.3f} ({labels:.0f}, {voxels:.0f})" for labels, voxels, dice in curve]
        needed = labels_for(curve, curves[CONTROL][-1, 2]) if CONTROL in curves else None
        cells.append("not reached" if needed is None else f"{needed:.1f}")
        lines.append(f"| {' | '.join([name, str(len(seeds)), *cells])} |")
    return "\n".join(lines) + "\n\nDice on held-out scans (human labels learned, voxels corrected so far).\n"


def labels_for(curve: np.ndarray, dice: float) -> float | None:
    """Labels at which a curve of (labels, voxels, Dice) first reaches a Dice, linear between its points."""
    for n, (labels, _, value) in enumerate(curve):
        if value >= dice:
            if n == 0:
                return float(labels)
            before, _, lower = curve[n - 1]
            return float(before + (labels - before) * (dice - lower) / (value - lower))
    return None


def _point(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["trained_on"], row["corrected"], row["held_out"]


def run(out: Path, plan: Plan, conf: dict[str, str], data: Path | None) -> bool:
    """One strategy with one seed, unless another process does it; whether it was this one."""
    folder = out / plan.strategy / f"seed{plan.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock").acquire(timeout=0):
            given = conf | {"model_dir": str(folder / "models"), "seed": str(1336 + plan.seed)}
            settings = load_settings(given, env={})[0]
            torch.set_num_threads(settings.threads or os.cpu_count() or 1)
            scans = (
                rotated(atria(data, plan.edge), plan.pool, (plan.seed - 1) * plan.first)
                if data
                else phantoms(plan.seed)
            )
            simulate(folder, plan, settings, scans, Annotator)
    except Timeout:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/annotator"))
    parser.add_argument("--data", type=Path, help="folder of left atria; without it phantoms")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--nights", type=int, default=5, help="rounds; labels are added after all but the last count")
    parser.add_argument("--labels", type=int, default=2, help="scans that are labelled after each round")
    parser.add_argument("--pool", type=int, default=16, help="scans in the studies folder")
    parser.add_argument("--edge", type=int, default=3, choices=sorted(PATCHES), help="left atria: averages over cubes")
    parser.add_argument("--first", type=int, default=2, help="labels before the first round")
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    conf = (LA | {"patch": PATCHES[arguments.edge]} if arguments.data else PHANTOM) | {"audits": "0"}
    conf |= dict(pair.split("=", 1) for pair in arguments.conf)
    plan = Plan(arguments.nights, arguments.labels, pool=arguments.pool, first=arguments.first, edge=arguments.edge)
    for seed in map(int, arguments.seeds.split(",")):
        for strategy in arguments.strategies.split(","):
            if not run(arguments.out, replace(plan, strategy=strategy, seed=seed), conf, arguments.data):
                logger.info("%s, seed %d: another process does it", strategy, seed)
            (arguments.out / "table.md").write_text(table(arguments.out))
    logger.info("\n%s", table(arguments.out))


if __name__ == "__main__":
    main()
