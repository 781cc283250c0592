"""Simulated weeks: real rounds, night after night, and humans who label what a strategy hands out from the true labels.

A night is a round on the studies folder, then the day after it: the humans answer the audits of the round, then label
``--labels`` scans that the strategy hands out, and save them through the server's own datastore. The truth of what
nobody has labelled lies outside the studies folder and is read for scoring only.

    python benchmarks/bench_nights.py --out work/nights --nights 3                        # phantoms, a few minutes
    python benchmarks/bench_nights.py --out work/weak --nights 7 --weak --aliens 0.05     # a bad first label, aliens
    python benchmarks/bench_nights.py --out work/la --nights 7 --data ../shared/data/la   # left atria, a third

Left atria at half the resolution, in two steps: the scans are written first, so that OUT alone can be taken to a faster
machine; there they are not read again.

    LA="--out work/la2 --data ../shared/data/la --edge 2 --nights 7 --pool 40 --first 8 --labels 1 --conf audits=2"
    python benchmarks/bench_nights.py $LA --build
    python benchmarks/bench_nights.py $LA --conf device=cuda

OUT/nights.json has a row for each night, OUT/table.md the table; both are written after every night. A killed run goes
on where it stopped: nights that are done are not computed again, the others find their finished steps.

Columns: labels spent so far (audits of this night), promoted scans, the aliens and poisoned scans among them, their
mean true Dice, the promise and whether it was kept, mean Dice of the served model on the labels that came after the
round (fresh) and on the held-out scans, and what the gate did with the SSL model.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from scipy import ndimage

from alien_scans import ALIENS, alien, poisoned
from aslseg.cases.scan_checks import ScanChecks
from aslseg.cases.studies import FINAL, PSEUDO
from aslseg.compute.overlap import dice
from aslseg.files import write_json
from aslseg.models.cascade import Cascade
from aslseg.models.kinds import ModelKind
from aslseg.models.published import find_published
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.ledger import Event, Ledger
from aslseg.rounds.run import run_round
from aslseg.serving.strategies import ByAgreement, ByAudit, HandsOut, Leases, Random
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.settings import Paths, Settings, load_settings
from aslseg.types import Volume
from aslseg.volume.io import case_id, read_image, read_label, write_image, write_label
from aslseg.volume.phantom import make_phantom
from realdata_la import averaged, averaged_affine

logger = logging.getLogger("bench_nights")

PHANTOM = {
    "labels": "liver",
    "nested": "",
    "spacing": "native",
    "network": "vnet_small",
    "patch": "32,32,16",
    "ssl_iterations": "60",
    "retrain_iterations": "30",
    "sam_iterations": "10",
    "adapter_iterations": "20",
    "promote_threshold": "0.85",
    "min_free_gb": "0",
}
LA = {
    "labels": "atrium",
    "nested": "",
    "modality": "mr",
    "spacing": "native",
    "network": "vnet_small",
    "ssl_iterations": "400",
    "retrain_iterations": "200",
    "sam_iterations": "60",
    "adapter_iterations": "150",
    "promote_threshold": "0.85",
}
PATCHES = {2: "64,64,32", 3: "48,48,32"}
"""Patch of left atria by edge."""
SHAPE = (32, 32, 12)
HELD_OUT = 12
PERSON = "simulated human"
OPTIONS: dict[str, dict[str, Any]] = {
    "edge": {"choices": sorted(PATCHES), "help": "left atria: 2 is half the resolution, 3 a third"},
    "strategy": {"choices": ("agreement", "confirm", "audit", "random")},
}
Source = Callable[[int], tuple[str, Volume, np.ndarray]]
"""Number of a scan to its id, the scan, and its true class map (i, j, k)."""


@dataclass(frozen=True)
class Plan:
    """What is simulated.

    Attributes:
        nights: Rounds.
        labels: Scans that the humans label after each round, beside the audits.
        strategy: What hands them out, as clients name it.
        pool: Scans in the studies folder.
        first: Labels before the first round.
        weak: The first label is bad: cut down to a third and moved.
        aliens, poison: Fractions of the unlabelled scans.
        seed: Of scans and aliens.
        edge: Edge of the cubes of voxels over which left atria are averaged.
    """

    nights: int = 3
    labels: int = 2
    strategy: str = "agreement"
    pool: int = 16
    first: int = 2
    weak: bool = False
    aliens: float = 0.0
    poison: float = 0.0
    seed: int = 1
    edge: int = 3


def phantoms(seed: int) -> Source:
    """Small phantoms with livers."""

    def scan(number: int) -> tuple[str, Volume, np.ndarray]:
        volume, label = make_phantom(seed, number, shape=SHAPE)
        return f"scan_{number:03d}", volume, (label > 0).astype(np.uint8)

    return scan


def atria(data: Path, edge: int) -> Source:
    """Left atria, averaged over cubes of ``edge`` voxels and rounded, which keeps the files small."""

    def scan(number: int) -> tuple[str, Volume, np.ndarray]:
        name = (data / "train.txt").read_text().split()[number]
        volume, mask = (read_image(data / part / f"{name}.nii.gz") for part in ("images", "labels"))
        image = np.rint(averaged(volume.array, edge)).astype(np.int16)
        label = (averaged(mask.array > 0, edge) >= 0.5).astype(np.uint8)
        return f"scan_{number:03d}", Volume(image, averaged_affine(volume.affine, edge)), label

    return scan


def build(out: Path, plan: Plan, source: Source) -> None:
    """Write ``studies``, ``truth`` (of all scans), ``heldout``, ``strange.json`` (aliens and poisoned scans), and last
    ``plan.json``; a folder that has it is left as it is.

    Raises:
        ValueError: The folder was made by another plan.
    """
    made_by = {k: v for k, v in vars(plan).items() if k not in ("nights", "labels", "strategy")}
    if (out / "plan.json").exists():
        before = json.loads((out / "plan.json").read_text())
        if before != made_by:
            raise ValueError(f"{out} was made with {before}, not with {made_by}: name another --out, or delete it")
        return
    unlabelled = range(plan.first, plan.pool)
    rng = np.random.default_rng(plan.seed)
    counts = [round(part * len(unlabelled)) for part in (plan.aliens, plan.poison)]
    drawn = [int(n) for n in rng.permutation(np.array(unlabelled))[: sum(counts)]]
    strange: dict[str, str] = {}
    for number in range(plan.pool + HELD_OUT):
        name, image, label = source(number)
        if number in drawn[: counts[0]]:
            kind = list(ALIENS)[drawn.index(number) % len(ALIENS)]
            image, strange[name] = alien(kind, image, label, number), kind
        elif number in drawn:
            image, strange[name] = poisoned(image, label, number), "poisoned"
        write_label(out / "truth" / f"{name}.nii.gz", label, image.affine)
        write_image(out / ("studies" if number < plan.pool else "heldout") / f"{name}.nii.gz", image)
        if number < plan.first:
            shown = bad_label(label) if plan.weak and number == 0 else label
            write_label(out / "studies" / "labels" / FINAL / f"{name}.nii.gz", shown, image.affine)
    write_json(out / "strange.json", strange)
    write_json(out / "plan.json", made_by)


def bad_label(label: np.ndarray) -> np.ndarray:
    """A careless label: a third of the object's slices, and moved by a sixth of the scan."""
    planes = np.flatnonzero(label.any((0, 1)))
    found = np.zeros_like(label)
    kept = planes[: max(1, len(planes) // 3)]
    found[:, :, kept] = ndimage.shift(label[:, :, kept], (label.shape[0] // 6, 0, 0), order=0)
    return found


class Week:
    """A studies folder and the humans who work on it.

    Args:
        out: Made by :func:`build`.
        plan: What is simulated.
        settings: Of the rounds.
    """

    def __init__(self, out: Path, plan: Plan, settings: Settings) -> None:
        self.out, self.plan, self.settings = out, plan, settings
        self.studies = out / "studies"
        self.paths = Paths(settings, self.studies)
        self.ledger, self.labels = Ledger(self.paths.ledger), settings.label_set
        self.strange: dict[str, str] = json.loads((out / "strange.json").read_text())
        self.store = StudiesDatastore(str(self.studies), settings, self.paths)
        self.scan_checks = ScanChecks(settings.max_voxels)
        self.strategy: Any = strategy(plan.strategy, self.ledger, self.scan_checks)

    def night(self, number: int) -> dict[str, Any]:
        """A round, unless it is done, and the day after it; returns the row of the table."""
        done = [r for r in self.ledger.rounds() if r.closed]
        summary = done[number - 1].summary if len(done) >= number else run_round(self.studies, self.settings)
        seconds = sum(summary["seconds"].values())
        closed = [e for e in self.ledger.events(kinds=("closed",)) if e.round == summary["round"]][-1]
        row = self.promoted(summary) | {"night": number, "seconds": seconds, "gate": self.gate(summary)}
        served = self.served()
        row["held_out"] = self.mean([self.score(served, p) for p in sorted((self.out / "heldout").glob("*"))])
        answered, new = self.day(closed)
        row["fresh"] = self.mean([self.score(served, self.studies / f"{c}.nii.gz") for c in [*answered, *new]])
        row["audits"], row["new_labels"] = len(answered), len(new)
        row["labels"] = len(self.human())
        row["warnings"], row["stages"] = summary["warnings"], summary["seconds"]
        return row

    def promoted(self, summary: dict[str, Any]) -> dict[str, Any]:
        """How good the promoted masks are, and what the round promised of them."""
        truth: dict[str, dict[str, float | None]] = {}
        for event in self.ledger.events(kinds=("mask",), tag=PSEUDO, number=summary["round"]):
            case = event.case or ""
            if case in summary["promoted"]:
                mask = read_image(MaskStore(self.paths.home).path(event.details["sha256"])).array.astype(np.uint8)
                truth[case] = self.compare(case, mask)
        dices = {n: self.mean([d[n] for d in truth.values()]) for n in self.labels.names}
        kept = {n: a.get("made") and (dices[n] or 0) >= a["target"] for n, a in summary.get("promise", {}).items()}
        return {
            "promoted": len(summary["promoted"]),
            "promoted_strange": sorted(self.strange[c] for c in summary["promoted"] if c in self.strange),
            "promoted_dice": self.mean(list(dices.values())),
            "promise": {
                n: {"made": bool(a.get("made")), "kept": kept[n]} for n, a in summary.get("promise", {}).items()
            },
        }

    @staticmethod
    def gate(summary: dict[str, Any]) -> str:
        """What became of the SSL model."""
        line = next(iter(summary["published"]), "")
        words = "not published" if "not published" in line else "unchanged" if "unchanged" in line else "published"
        return words + (f", {len(summary['withdrawn'])} withdrawn" if summary["withdrawn"] else "")

    def served(self) -> Cascade | None:
        """The published SSL model."""
        model = find_published(self.paths, ModelKind.SSL)
        return Cascade.load({ModelKind.SSL: model.path}, self.settings) if model else None

    def score(self, served: Cascade | None, scan: Path) -> float | None:
        """Mean Dice over the labels of the served model's mask of a scan."""
        if served is None:
            return 0.0
        mask = served.masks(read_image(scan))[ModelKind.SSL]
        return self.mean(list(self.compare(case_id(scan), mask).values()))

    def compare(self, case: str, mask: np.ndarray) -> dict[str, float | None]:
        """True Dice by label of a class map (i, j, k)."""
        path = self.out / "truth" / f"{case}.nii.gz"
        truth = read_label(path, read_image(path), self.labels)
        pairs = zip(self.labels.names, self.labels.regions(mask), self.labels.regions(truth), strict=True)
        return {name: dice(a, b) for name, a, b in pairs}

    @staticmethod
    def mean(values: Sequence[float | None]) -> float | None:
        """Of those that are known."""
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if known else None

    def day(self, closed: Event) -> tuple[list[str], list[str]]:
        """The humans answer the audits, then label what the strategy hands out; both as cases, also on a second try."""
        drawn = {e.case: None for e in self.ledger.events(kinds=("audit",)) if e.case}
        saved = [e.case or "" for e in self.ledger.events(kinds=("saved",), tag=FINAL) if e.seq > closed.seq]
        answered = [c for c in saved if c in drawn]
        human = self.human()
        for case in drawn:
            if case not in human:
                self.label("audit", case)
                answered.append(case)
        new = [c for c in saved if c not in drawn]
        skipped: set[str] = set()
        while len(new) < self.plan.labels:
            sample = self.strategy({"client_id": PERSON}, self.store)
            case = sample.get("id")
            if not case or case in skipped:
                break
            # nobody draws a liver where there is none; the next sample is another scan
            if case in self.strange and self.strange[case] != "poisoned":
                skipped.add(case)
                continue
            self.label(self.plan.strategy, case)
            new.append(case)
        return answered, new

    def human(self) -> set[str]:
        """Cases with a human label."""
        return {p.name[: -len(".nii.gz")] for p in (self.studies / "labels" / FINAL).glob("*.nii.gz")}

    def label(self, strategy: str, case: str) -> None:
        """Save the true label of a scan that was handed out."""
        handed = {strategy: {"ts": int(time.time()), "client_id": PERSON}}
        self.store.update_image_info(case, {"strategy": handed})
        self.store.save_label(case, str(self.out / "truth" / f"{case}.nii.gz"), FINAL, {})


def strategy(name: str, ledger: Ledger, checks: ScanChecks) -> HandsOut:
    """The server's strategy of this name, without importing the rest of the server."""
    if name == "random":
        return Random(Leases(), checks, np.random.default_rng(0))
    if name == "audit":
        return ByAudit(ledger, Leases(), checks, name)
    return ByAgreement(ledger, Leases(), checks, name == "confirm", name)


def simulate(
    out: Path, plan: Plan, settings: Settings, source: Source, people: Callable[[Path, Plan, Settings], Week] = Week
) -> list[dict[str, Any]]:
    """All nights; those that are done already are not run again."""
    build(out, plan, source)
    result, week = out / "nights.json", people(out, plan, settings)
    rows: list[dict[str, Any]] = json.loads(result.read_text()) if result.exists() else []
    for number in range(len(rows) + 1, plan.nights + 1):
        rows.append(week.night(number))
        write_json(result, rows)
        (out / "table.md").write_text(table(rows))
        logger.info("night %d: %s", number, rows[-1])
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The nights as Markdown."""
    head = (
        "night",
        "labels (audits)",
        "promoted",
        "strange",
        "Dice of promoted",
        "promise",
        "fresh",
        "held out",
        "gate",
    )
    lines = [f"| {' | '.join(head)} | s |", "|---" * (len(head) + 1) + "|"]
    for r in rows:
        promise = ", ".join(
            f"{n} {'kept' if p['kept'] else 'broken'}" if p["made"] else f"{n} none" for n, p in r["promise"].items()
        )
        cells = [
            r["night"],
            f"{r['labels']} ({r['audits']})",
            r["promoted"],
            ", ".join(r["promoted_strange"]) or "none",
            *(_number(r["promoted_dice"]), promise or "none", _number(r["fresh"]), _number(r["held_out"]), r["gate"]),
            round(r["seconds"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/nights"))
    parser.add_argument("--data", type=Path, help="folder of left atria; without it phantoms")
    for name, value in Plan().__dict__.items():
        option: dict[str, Any] = {"action": "store_true"} if value is False else {"type": type(value), "default": value}
        parser.add_argument(f"--{name}", **option, **OPTIONS.get(name, {}))
    parser.add_argument("--build", action="store_true", help="write the scans only")
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    plan = Plan(**{name: getattr(arguments, name) for name in Plan().__dict__})
    source = atria(arguments.data, plan.edge) if arguments.data else phantoms(plan.seed)
    if arguments.build:
        return build(arguments.out, plan, source)
    conf = (LA | {"patch": PATCHES[plan.edge]}) if arguments.data else PHANTOM
    conf |= {"model_dir": str(arguments.out / "models")} | dict(pair.split("=", 1) for pair in arguments.conf)
    settings = load_settings(conf, env={})[0]
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    logger.info("\n%s", table(simulate(arguments.out, plan, settings, source)))


if __name__ == "__main__":
    main()
