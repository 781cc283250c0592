"""Many runs of bench_lits.py side by side, for a machine with a GPU and many cores that is lent for minutes.

    python benchmarks/lits_plan.py --arms 8,8-liver,4,full --rotations 1,2,3 --minutes 8 --jobs 8 --out work/plan \\
        --conf device=cuda --conf network=vnet

Arms: the number of labelled scans, with ``-liver`` (no tumour label, only synthetic lesions), ``-unknown`` or
``-plain`` (nothing synthetic); ``full`` is full supervision in four folds. Short trainings say first how long a step
takes while ``--jobs`` run side by side; the steps then fill ``--minutes``. Stages are trained apart and joined; arms
with as many labelled scans share the first stage. A run that fails is left out, and its log says why.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lits_scoring import DATA

logger = logging.getLogger("lits_plan")

BENCH = Path(__file__).with_name("bench_lits.py")
FOLDS = 4
CALIBRATION_STEPS = 40
# part of the minutes that reading, calibration, scoring and waiting for the last run take
SPARE = 0.3
SETTINGS = {"liver": ["--tumours", "liver"], "unknown": ["--tumours", "unknown"], "plain": [], "": []}


@dataclass(frozen=True)
class Run:
    """Both stages of an arm on one split.

    Attributes:
        name: Folder of its second stage and of both.
        first: Folder of its first stage.
        split: Arguments that name the scans.
        extra: Arguments of the second stage.
    """

    name: str
    first: str
    split: tuple[str, ...]
    extra: tuple[str, ...]


def runs(arms: list[str], rotations: list[str], seeds: list[str]) -> list[Run]:
    """The runs of all arms, by seed first, so that what is cut off is the last repetition.

    Raises:
        ValueError: An unknown arm.
    """
    found = []
    for seed, arm in product(seeds, arms):
        kind, _, how = arm.partition("-")
        if how not in SETTINGS or not (kind == "full" or kind.isdigit()):
            raise ValueError(f"expected an arm such as 8, 4-liver or full-plain, got {arm!r}")
        conf = ("--conf", f"seed={seed}")
        extra = (*SETTINGS[how], *(("--conf", "nested_synthetic=0") if how == "plain" else ()))
        for part in [f"{n}/{FOLDS}" for n in range(1, FOLDS + 1)] if kind == "full" else rotations:
            split = ("--fold", part) if kind == "full" else ("--rotation", part, "--labelled", kind)
            place = f"{part.replace('/', 'of')}-s{seed}"
            found.append(Run(f"{arm}-{place}", f"first-{kind}-{place}", (*split, *conf), extra))
    return found


class Plan:
    """Runs bench_lits.py, several at a time, each on few threads."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, arguments.out
        self.deadline = time.monotonic() + 60 * arguments.minutes
        threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def bench(self, what: str, folder: str, more: tuple[str, ...]) -> bool:
        """One call; whether it succeeded."""
        a = self.arguments
        common = ["--out", str(self.out / folder), "--data", str(a.data), "--cache", str(a.cache)]
        conf = [part for pair in a.conf for part in ("--conf", pair)]
        (self.out / folder).mkdir(parents=True, exist_ok=True)
        left = self.deadline - time.monotonic()
        with (self.out / folder / f"{what}.log").open("w") as log:
            try:
                command = [sys.executable, str(BENCH), what, *common, *conf, *more]
                subprocess.run(command, env=self.environment, stdout=log, stderr=log, check=True, timeout=max(left, 1))
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                logger.warning("%s %s: %s", what, folder, error)
                return False
        logger.info("%s %s done, %.0f s left", what, folder, self.deadline - time.monotonic())
        return True

    def all_of(self, calls: list[tuple[str, str, tuple[str, ...]]]) -> None:
        """Several calls, ``jobs`` at a time, in order."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(lambda call: self.bench(*call), calls))

    def pace(self, run: Run) -> float:
        """Seconds of a step of the second stage while ``jobs`` trainings run."""
        steps = ("--steps", str(CALIBRATION_STEPS), "--train-only")
        names = [f"pace-{n}" for n in range(self.arguments.jobs)]
        self.all_of([("second", name, (*run.split, *run.extra, *steps)) for name in names])
        found = [json.loads(p.read_text())["seconds_per_step"] for p in self.out.glob("pace-[0-9]*/trained.json")]
        if not found:
            raise SystemExit(f"no training ran; see {self.out}/pace-*/*.log")
        return sum(found) / len(found)

    def steps(self, found: list[Run]) -> tuple[int, int]:
        """Steps of the first and of the second stages."""
        a = self.arguments
        if a.steps:
            return max(1, round(a.steps * a.first_part)), a.steps
        pace = self.pace(found[0])
        firsts = len({run.first for run in found})
        shares = [1 + (0.5 * a.crossfit if a.true_liver and "--tumours" not in run.extra else 0) for run in found]
        # in lengths of a second stage: what each job has to do, or the longest call
        length = max((sum(shares) + firsts * a.first_part) / a.jobs, max(shares), a.first_part)
        second = int((self.deadline - time.monotonic()) * (1 - SPARE) / pace / length)
        logger.info("%.3f s a step with %d side by side: %d steps of the second stage", pace, a.jobs, second)
        return max(1, round(second * a.first_part)), max(1, second)

    def run(self) -> None:
        """Everything, and the table of what has been scored."""
        a = self.arguments
        found = runs(a.arms.split(","), a.rotations.split(","), a.seeds.split(","))
        # one after the other, so that no two read the same scans
        for number, run in enumerate({run.split[:2]: run for run in found}.values()):
            self.bench("prepare", f"prepare-{number}", run.split)
        first, second = self.steps(found)
        # both stages joined have no limits on components, so that nobody needs the folds
        crossfit = ("--crossfit", str(a.crossfit)) if a.true_liver else ("--train-only",)
        firsts = {run.first: ("first", run.first, (*run.split, "--steps", str(first), "--train-only")) for run in found}
        seconds = [
            ("second", f"{run.name}/second", (*run.split, *run.extra, *crossfit, "--steps", str(second)))
            for run in found
        ]
        # the longest first, so that no core waits for one at the end
        self.all_of([*seconds, *firsts.values()])
        self.all_of(
            [
                (
                    "joined",
                    f"{run.name}/joined",
                    (
                        *(*run.split, *run.extra),
                        *("--first", str(self.out / run.first), "--second", str(self.out / run.name / "second")),
                    ),
                )
                for run in found
            ]
        )
        results = sorted(map(str, self.out.glob("*/*/result.json")))
        if results:
            subprocess.run(
                [sys.executable, str(BENCH), "table", *results, "--out", str(self.out), "--data", str(a.data)],
                check=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="8,4,1,8-liver,8-plain,full")
    parser.add_argument("--rotations", default="1,2,3")
    parser.add_argument("--seeds", default="1337")
    parser.add_argument("--minutes", type=float, required=True, help="for everything")
    parser.add_argument("--jobs", type=int, default=8, help="trainings side by side")
    parser.add_argument("--steps", type=int, default=0, help="of the second stage; 0: as many as fit")
    parser.add_argument("--first-part", type=float, default=1.0, help="steps of the first stage, as a part of these")
    parser.add_argument("--true-liver", action="store_true", help="score the second stage in the true liver as well")
    parser.add_argument("--crossfit", type=int, default=2, help="folds for limits on components, with --true-liver")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=Path("work/lits_cache"))
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    Plan(arguments).run()


if __name__ == "__main__":
    main()
