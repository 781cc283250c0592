"""Tumours of real livers (../shared/data/lits_tumour), split by patient: what the SSL model finds.

    python benchmarks/bench_lits.py second --steps 600 --out work/second   # second stage alone, inside the true liver
    python benchmarks/bench_lits.py whole --steps 2000 --out work/whole    # both stages, as a round trains them
    python benchmarks/bench_lits.py first --steps 800 --out work/first     # first stage alone: livers
    python benchmarks/bench_lits.py joined --first work/first --second work/second --out work/joined
    python benchmarks/bench_lits.py table work/*/result.json --out work    # one table: work/table.md

Settings over the defaults with --conf (device=cuda for all parts); --labelled 4 takes the first four of the labelled
set that --rotation names; --fold 1/4 learns from all patients but a quarter and scores these: full supervision.
--tumours liver: no tumour is labelled, only livers, so that synthetic lesions alone say what a tumour is; --tumours
unknown: the same, but true tumours count for nothing in the second stage's loss. --crossfit 4, with ``second``, trains
it four times more, each without a quarter of the labelled scans, to choose which components are too small or too
unsure; ``joined`` does not use these limits, which are those of the second stage alone in the true liver
(realdata_lits.py fits those of both stages).

An --out that holds a model is only scored; ``prepare`` only brings the scans to the working grid. Without unlabelled
scans the second stage does not depend on the first, so that both can be trained side by side and joined: the same as
``whole`` with as many steps of each. Several second stages can share a first one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.device import choose_device
from aslseg.compute.overlap import dice
from aslseg.compute.weights import load_weights, save_weights
from aslseg.rounds.folds.cross_fit import folds
from aslseg.settings import Settings, load_settings
from aslseg.ssl import engine, nested, predict, specks, training
from lits_scoring import (
    DATA,
    ROTATIONS,
    draw,
    read_results,
    row_of,
    show,
    slice_of_most,
    summary,
    table,
)
from lits_split import LITS, Split, split

logger = logging.getLogger("bench_lits")


class Second:
    """The second stage by itself, in the box of the true liver."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings, scans: Split) -> None:
        self.arguments, self.scans = arguments, scans
        self.branch = nested.branches(settings.label_set)[0]
        self.geometry = nested.geometry(scans.labelled, self.branch, settings, scans.spacing)
        self.settings = nested.settings_of(settings, self.branch.labels)
        logger.info("%s", self.geometry)

    def view(self, case: Prepared) -> Prepared:
        return nested.view_case(case, np.asarray(case.label) > 0, self.branch, self.geometry)

    def train(self, labelled: Sequence[Prepared], out: Path, steps: int) -> dict[str, Any]:
        free = [] if self.settings.ssl_method == "supervised" else self.scans.rest
        return engine.train(
            [self.view(c) for c in labelled],
            [engine.without_label(self.view(c)) for c in free],
            self.settings,
            out,
            iterations=steps,
            spacing=self.scans.spacing,
        )

    def model(self, path: Path) -> predict.SSLModel:
        state, metadata = load_weights(path, "ssl")
        return predict.stage_model(path, state, metadata, self.settings)

    def predict(self, model: predict.SSLModel, case: Prepared) -> tuple[Any, np.ndarray]:
        """Where the box is, and class probabilities in it."""
        seen = nested.look(case.image, np.asarray(case.label) > 0, self.geometry)
        return seen.where, predict.inner_probabilities(model, seen)[0]

    def limits(self) -> dict[str, Any]:
        """What a component must reach, from labelled scans that a network has not learned; empty if nothing says it."""
        if not self.arguments.crossfit or self.arguments.tumours != "labelled":
            return {}
        scores = []
        for n, part in enumerate(folds(self.scans.labelled, self.arguments.crossfit)):
            ids = {c.id for c in part}
            path = self.arguments.out / f"fold-{n}.safetensors"
            if not path.exists():
                steps = self.arguments.fold_steps or self.arguments.steps // 2
                self.train([c for c in self.scans.labelled if c.id not in ids], path, steps)
            model = self.model(path)
            for case in part:
                where, p = self.predict(model, case)
                truth = np.asarray(case.label)[where] == 2
                region = self.branch.labels.region_probabilities(p)[1]
                scores.append(specks.Scan.of(case.patient, region, truth, case.grid.spacing))
        found = specks.fit(scores)
        logger.info("limits on components from %d scans out of fold: %s", len(scores), found)
        return specks.stored({"tumour": found}) if found else {}


def second_only(arguments: argparse.Namespace, settings: Settings) -> None:
    """Train and score the second stage."""
    scans = split(arguments, settings)
    second = Second(arguments, settings, scans)
    out = arguments.out / "second.safetensors"
    if not out.exists():
        trained(arguments, second.train(scans.labelled, out, arguments.steps))
        limits = second.limits()
        if limits:
            state, metadata = load_weights(out, "ssl")
            save_weights(out, state, metadata | {"specks": limits})
    if arguments.train_only:
        return
    model = second.model(out)
    scored = Scored(arguments, settings, model.metadata.pop("specks", {}))
    for case in scans.test:
        where, p = second.predict(model, case)
        scored.add(case, where, p)
    scored.finish()


def first_only(arguments: argparse.Namespace, settings: Settings) -> None:
    """The first stage by itself: whole livers, tumours counted as liver."""
    scans = split(arguments, settings)
    top, scale = nested.first_settings(settings), nested.first_scale(scans.labelled, settings, scans.spacing)
    out = arguments.out / "first.safetensors"
    if not out.exists():
        livers = [replace(c, label=nested.merged(np.asarray(c.label), settings.label_set)) for c in scans.labelled]
        livers = [nested.scaled_case(replace(c, voxel_weight=None), top.label_set, scale) for c in livers]
        rest = [] if settings.ssl_method == "supervised" else scans.rest
        free = [nested.scaled_case(engine.without_label(c), top.label_set, scale) for c in rest]
        trained(arguments, engine.train(livers, free, top, out, iterations=arguments.steps, spacing=scans.spacing))
    if arguments.train_only:
        return
    state, metadata = load_weights(out, "ssl")
    model = predict.ScaledModel(predict.stage_model(out, state, metadata, top), scale)
    found = {}
    for case in scans.test:
        mask = nested.largest(model.predict(np.asarray(case.image)).argmax(0) == 1)
        found[case.id] = dice(mask, np.asarray(case.label) > 0)
        logger.info("%s liver %.3f", case.id, found[case.id])
    (arguments.out / "livers.json").write_text(json.dumps(found, indent=1))


def joined(arguments: argparse.Namespace, settings: Settings) -> None:
    """Both stages, each from a training of its own."""
    scans = split(arguments, settings)
    second = Second(arguments, settings, scans)
    path = arguments.first / "first.safetensors"
    state, metadata = load_weights(path, "ssl")
    first = predict.ScaledModel(
        predict.stage_model(path, state, metadata, nested.first_settings(settings)),
        nested.first_scale(scans.labelled, settings, scans.spacing),
    )
    inner = second.model(arguments.second / "second.safetensors")
    if inner.metadata["method"] != "supervised":
        raise SystemExit("the second stage has seen the true livers of unlabelled scans; train both stages with whole")
    arguments.steps = metadata["iterations"] + inner.metadata["iterations"]
    parts = [(second.branch, second.geometry, inner)]
    score_whole(arguments, settings, predict.NestedModel(first, parts, metadata, settings), scans.test)


def whole(arguments: argparse.Namespace, settings: Settings) -> None:
    """Both stages, as a round trains and uses them."""
    scans = split(arguments, settings)
    out = arguments.out / "ssl.safetensors"
    if not out.exists():
        free = [] if settings.ssl_method == "supervised" else scans.rest
        steps = arguments.steps
        trained(arguments, training.train(scans.labelled, free, settings, out, iterations=steps, spacing=scans.spacing))
    score_whole(arguments, settings, predict.load(out, settings), scans.test)


def trained(arguments: argparse.Namespace, done: dict[str, Any]) -> None:
    """Keep what a training says of itself."""
    logger.info("%s", done)
    (arguments.out / "trained.json").write_text(json.dumps(done, indent=1))


def score_whole(
    arguments: argparse.Namespace,
    settings: Settings,
    model: predict.SSLModel | predict.NestedModel,
    test: Sequence[Prepared],
) -> None:
    """Rows of whole scans."""
    # taken away here, so that both are scored
    scored = Scored(arguments, settings, model.metadata.pop("specks", {}))
    for case in test:
        scored.add(case, np.s_[:, :, :], model.predict(np.asarray(case.image)))
    scored.finish()


class Scored:
    """The rows of a run, and what its picture needs.

    Args:
        arguments: Of the run.
        settings: Its labels.
        limits: What a component must reach (:mod:`aslseg.ssl.specks`); empty: nothing.
    """

    def __init__(self, arguments: argparse.Namespace, settings: Settings, limits: dict[str, Any]) -> None:
        self.arguments, self.labels, self.limits = arguments, settings.label_set, limits
        self.seed, self.began = settings.seed, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.slices: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, case: Prepared, where: Any, p: np.ndarray) -> None:
        """Score class probabilities (1 + N, i, j, k) in a box."""
        before = None
        if self.limits:
            before = self.labels.decode(self.labels.region_probabilities(p))
            specks.clear(p, self.labels, self.limits, case.grid.spacing)
        found = self.labels.decode(self.labels.region_probabilities(p))
        self.add_mask(case, where, found, before)
        if self.arguments.keep:
            truth = np.asarray(case.label)[where]
            kept = {"found": found, "truth": truth, "image": np.asarray(case.image[where]), "p": p.astype(np.float16)}
            np.savez_compressed(self.arguments.out / f"{case.id}.npz", **kept)

    def add_mask(self, case: Prepared, where: Any, found: np.ndarray, unfiltered: np.ndarray | None = None) -> None:
        """Score a class map in a box, and what it was with all components."""
        truth = np.asarray(case.label)[where]
        row = row_of(case, found, truth, unfiltered)
        self.rows.append(row)
        if (truth == 2).any():
            self.slices[case.id] = slice_of_most(truth, found)

    def finish(self) -> None:
        """Write result.json and outlines.png."""
        a = self.arguments
        result = {
            "arm": a.arm,
            "rotation": a.rotation,
            "fold": a.fold,
            "seed": self.seed,
            "steps": a.steps,
            "limits": self.limits,
            "summary": summary(self.rows),
            "rows": self.rows,
            "arguments": {k: str(v) for k, v in vars(a).items()},
        }
        if self.limits:
            result["unfiltered"] = summary(self.rows, "unfiltered")
        (a.out / "result.json").write_text(json.dumps(result, indent=1))
        seconds = time.monotonic() - self.began
        logger.info("scored in %.0f s\n%s\n%s", seconds, show(self.rows), json.dumps(result["summary"], indent=1))
        draw(self.rows, self.slices, a.out / "outlines.png")


def make_table(arguments: argparse.Namespace) -> None:
    """One table, and one file with all results."""
    results = read_results(arguments.results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results))
    (arguments.out / "table.md").write_text(table(results, arguments.data))
    logger.info("\n%s", table(results, arguments.data))


def arm_of(arguments: argparse.Namespace, settings: Settings) -> str:
    """Name of what is compared; the runs of an arm differ in nothing but patients and seed."""
    learned = "full supervision" if arguments.fold else f"{arguments.labelled} labelled"
    said = {"labelled": "", "liver": ", no tumour label", "unknown": ", true tumours unknown"}[arguments.tumours]
    synthetic = "" if settings.nested_synthetic else ", nothing synthetic"
    where = ", true liver" if getattr(arguments, "what", "") == "second" else ""
    return f"{learned}{said}{synthetic}, {settings.ssl_method}{where}"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("what", choices=["prepare", "first", "second", "joined", "whole", "table"])
    found.add_argument("results", nargs="*", type=Path, help="result.json files of a table")
    found.add_argument("--first", type=Path, help="folder of the first stage to join")
    found.add_argument("--second", type=Path, help="folder of the second stage to join")
    found.add_argument("--fold-steps", type=int, default=0, help="steps of each fold; default: half of --steps")
    found.add_argument("--train-only", action="store_true", help="first and second: score nothing")
    return shared_arguments(found)


def shared_arguments(found: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of all runs on lits_tumour."""
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--data", type=Path, default=DATA)
    found.add_argument("--cache", type=Path, default=Path("work/lits_cache"))
    found.add_argument("--labelled", type=int, default=8)
    found.add_argument("--rotation", type=int, default=1, choices=range(1, len(ROTATIONS) + 1))
    found.add_argument("--fold", help="number/count: learn from all other patients, score those of this fold")
    found.add_argument("--tumours", choices=["labelled", "liver", "unknown"], default="labelled")
    found.add_argument("--crossfit", type=int, default=0, help="folds that choose the least component; 0: none")
    found.add_argument("--steps", type=int, default=800)
    found.add_argument("--arm", help="name in the table")
    found.add_argument("--keep", action="store_true", help="keep masks, images and probabilities of each scan")
    found.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE")
    return found


def prepare(arguments: argparse.Namespace, defaults: dict[str, str]) -> Settings:
    """Settings of a run; its folder is made and its arm named."""
    settings = load_settings(LITS | defaults | dict(pair.split("=", 1) for pair in arguments.conf), env={})[0]
    torch.set_num_threads(settings.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.backends.cudnn.benchmark = choose_device(settings).type == "cuda"
    arguments.arm = arguments.arm or arm_of(arguments, settings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return settings


def main() -> None:
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if arguments.what == "table":
        make_table(arguments)
        return
    if arguments.what == "whole" and arguments.tumours == "unknown":
        parser().error("--tumours unknown leaves gaps in the first stage's livers too; use first, second and joined")
    settings = prepare(arguments, {"ssl_method": "supervised"})
    work = {"prepare": split, "first": first_only, "second": second_only, "joined": joined, "whole": whole}
    work[arguments.what](arguments, settings)


if __name__ == "__main__":
    main()
