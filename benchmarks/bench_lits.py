"""Tumours of real livers (../shared/data/lits_tumour), split by patient: what the SSL model finds.

    python benchmarks/bench_lits.py second --steps 600 --out work/second   # second stage alone, inside the true liver
    python benchmarks/bench_lits.py whole --steps 2000 --out work/whole    # both stages, as a round trains them
    python benchmarks/bench_lits.py first --steps 800 --out work/first     # first stage alone: livers
    python benchmarks/bench_lits.py joined --first work/first --second work/second --out work/joined

Settings over the defaults with --conf; --labelled 4 takes the first four of the labelled set that --rotation names. An
--out that holds a model is only scored. Without unlabelled scans the second stage does not depend on the first, so
that both can be trained side by side on two cores and joined: the same as ``whole`` with as many steps of each.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_erosion

from aslseg.agreement.lesions import count_lesions
from aslseg.cases.prepare import PreparedStore, working_spacing
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import Case
from aslseg.compute.overlap import dice
from aslseg.compute.weights import load_weights
from aslseg.settings import Settings, load_settings
from aslseg.ssl import engine, nested, predict, training
from aslseg.volume.io import read_image

DATA = Path(__file__).parents[2] / "shared" / "data" / "lits_tumour"
# labelled sets of eight patients: the suggested one, which leaves the smallest and palest lesions to be found, and two
# halves of mixed difficulty, of which each is held out while the other is learned from
ROTATIONS = (
    (33, 40, 23, 0, 4, 7, 29, 18),
    (33, 23, 7, 29, 11, 14, 35, 43),
    (40, 0, 4, 18, 5, 12, 39, 50),
)
logger = logging.getLogger("bench_lits")


def patients() -> dict[str, str]:
    with (DATA / "patients.csv").open() as file:
        return {row["case"]: row["patient"] for row in csv.DictReader(file)}


def prepared(
    settings: Settings, cache: Path, chosen: Sequence[int], count: int
) -> tuple[list[Prepared], list[Prepared], list[Prepared], tuple]:
    """Labelled, unlabelled (other scans of the eight labelled patients) and held-out cases."""
    who = patients()
    labelled = [f"lits_{n:03d}" for n in chosen[:count]]
    known = {who[f"lits_{n:03d}"] for n in chosen}
    spacing = working_spacing([read_image(DATA / "images" / f"lits_{n:03d}.nii.gz") for n in chosen], settings)
    store = PreparedStore(cache, settings, spacing)
    cases = {
        name: store.load(
            Case(name, DATA / "images" / f"{name}.nii.gz", patient, "train", DATA / "labels" / f"{name}.nii.gz")
        )
        for name, patient in who.items()
    }
    rest = [c for n, c in cases.items() if c.patient in known and n not in labelled]
    test = [c for c in cases.values() if c.patient not in known]
    return [cases[n] for n in labelled], rest, test, spacing


def lesion_score(found: np.ndarray, true: np.ndarray) -> dict[str, float | int | None]:
    """Dice, lesions and volumes (voxels) of tumour masks."""
    counts = count_lesions(found, true)
    return {
        "dice": dice(found, true),
        "lesions": counts.true,
        "found": counts.found,
        "false": counts.false,
        "voxels": int(true.sum()),
        "predicted": int(found.sum()),
    }


def summary(rows: list[dict]) -> dict[str, float | None]:
    """Means over patients (over the scans of a patient first)."""

    def per_patient(key, chosen):
        values: dict[str, list[float]] = {}
        for row in chosen:
            value = key(row)
            if value is not None:
                values.setdefault(row["patient"], []).append(value)
        means = [float(np.mean(v)) for v in values.values()]
        return float(np.mean(means)) if means else None

    ill = [r for r in rows if r["tumour"]["voxels"]]
    healthy = [r for r in rows if not r["tumour"]["voxels"]]
    return {
        "liver": per_patient(lambda r: r["liver"], rows),
        "tumour": per_patient(lambda r: r["tumour"]["dice"], ill),
        "lesion_recall": per_patient(lambda r: r["tumour"]["found"] / r["tumour"]["lesions"], ill),
        "false_lesions": per_patient(lambda r: r["tumour"]["false"], rows),
        "false_lesions_healthy": per_patient(lambda r: r["tumour"]["false"], healthy),
        "healthy_called_ill": per_patient(lambda r: float(r["tumour"]["predicted"] > 0), healthy),
        "volume_error": per_patient(lambda r: abs(r["tumour"]["predicted"] / r["tumour"]["voxels"] - 1), ill),
    }


def show(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        t = r["tumour"]
        dice = "  -  " if t["dice"] is None else f"{t['dice']:.3f}"
        lines.append(
            f"{r['case']} liver {r['liver']:.3f} tumour {dice} found {t['found']}/{t['lesions']} false {t['false']} "
            f"voxels {t['voxels']} predicted {t['predicted']}"
        )
    return "\n".join(lines)


def second_only(arguments: argparse.Namespace, settings: Settings) -> None:
    """The second stage by itself, in the box of the true liver."""
    chosen = ROTATIONS[arguments.rotation - 1]
    labelled, rest, test, spacing = prepared(settings, arguments.cache, chosen, arguments.labelled)
    branch = nested.branches(settings.label_set)[0]
    geometry = nested.geometry(labelled, branch, settings, spacing)
    logger.info("%s", geometry)

    def view(case: Prepared) -> Prepared:
        return nested.view_case(case, np.isin(case.label, branch.values), branch, geometry)

    inner = nested.settings_of(settings, branch.labels)
    out = arguments.out / "second.safetensors"
    began = time.monotonic()
    if not out.exists():
        done = engine.train(
            [view(c) for c in labelled],
            [replace(view(c), label=None) for c in rest],
            inner,
            out,
            iterations=arguments.steps,
            spacing=spacing,
        )
        logger.info("%s", done)
        (arguments.out / "trained.json").write_text(json.dumps(done, indent=1))
    logger.info("trained in %.1f min", (time.monotonic() - began) / 60)
    state, metadata = load_weights(out, "ssl")
    model = predict.stage_model(out, state, metadata, inner)
    rows = []
    for case in test:
        seen = nested.look(case.image, np.isin(case.label, branch.values), geometry)
        p, _ = predict.inner_probabilities(model, seen)
        found = branch.labels.decode(branch.labels.region_probabilities(p))
        rows.append(score(arguments, case, seen.where, found, np.asarray(case.label)[seen.where], p))
    finish(arguments, rows)


def first_only(arguments: argparse.Namespace, settings: Settings) -> None:
    """The first stage by itself: whole livers, tumours counted as liver."""
    chosen = ROTATIONS[arguments.rotation - 1]
    labelled, _, test, spacing = prepared(settings, arguments.cache, chosen, arguments.labelled)
    top = nested.first_settings(settings)
    out = arguments.out / "first.safetensors"
    began = time.monotonic()
    if not out.exists():
        livers = [replace(c, label=nested.merged(np.asarray(c.label), settings.label_set)) for c in labelled]
        done = engine.train(livers, [], top, out, iterations=arguments.steps, spacing=spacing)
        logger.info("%s", done)
        (arguments.out / "trained.json").write_text(json.dumps(done, indent=1))
    logger.info("trained in %.1f min", (time.monotonic() - began) / 60)
    state, metadata = load_weights(out, "ssl")
    model = predict.stage_model(out, state, metadata, top)
    for case in test:
        found = nested.largest(model.predict(np.asarray(case.image)).argmax(0) == 1)
        logger.info("%s liver %.3f", case.id, dice(found, np.asarray(case.label) > 0))
    logger.info("scored in %.1f min", (time.monotonic() - began) / 60)


def joined(arguments: argparse.Namespace, settings: Settings) -> None:
    """Both stages, each from a training of its own."""
    chosen = ROTATIONS[arguments.rotation - 1]
    labelled, _, test, spacing = prepared(settings, arguments.cache, chosen, arguments.labelled)
    branch = nested.branches(settings.label_set)[0]
    geometry = nested.geometry(labelled, branch, settings, spacing)
    path, second = arguments.first / "first.safetensors", arguments.second / "second.safetensors"
    state, metadata = load_weights(path, "ssl")
    first = predict.stage_model(path, state, metadata, nested.first_settings(settings))
    inner = predict.stage_model(second, *load_weights(second, "ssl"), nested.settings_of(settings, branch.labels))
    score_whole(arguments, settings, predict.NestedModel(first, [(branch, geometry, inner)], metadata, settings), test)


def whole(arguments: argparse.Namespace, settings: Settings) -> None:
    """Both stages, as a round trains and uses them."""
    chosen = ROTATIONS[arguments.rotation - 1]
    labelled, rest, test, spacing = prepared(settings, arguments.cache, chosen, arguments.labelled)
    out = arguments.out / "ssl.safetensors"
    began = time.monotonic()
    if not out.exists():
        free = [] if settings.ssl_method == "supervised" else rest
        done = training.train(labelled, free, settings, out, iterations=arguments.steps, spacing=spacing)
        logger.info("%s", done)
        (arguments.out / "trained.json").write_text(json.dumps(done | {"minutes": (time.monotonic() - began) / 60}))
    score_whole(arguments, settings, predict.load(out, settings), test)


def score_whole(
    arguments: argparse.Namespace,
    settings: Settings,
    model: predict.SSLModel | predict.NestedModel,
    test: Sequence[Prepared],
) -> None:
    """Rows of whole scans."""
    rows = []
    for case in test:
        p = model.predict(np.asarray(case.image))
        found = settings.label_set.decode(settings.label_set.region_probabilities(p))
        rows.append(score(arguments, case, np.s_[:, :, :], found, np.asarray(case.label), p))
    finish(arguments, rows)


def score(
    arguments: argparse.Namespace, case: Prepared, where: Any, found: np.ndarray, truth: np.ndarray, p: np.ndarray
) -> dict:
    """A scan's row; what a picture needs is kept."""
    np.savez_compressed(
        arguments.out / f"{case.id}.npz",
        found=found,
        truth=truth,
        image=np.asarray(case.image[where]),
        p=p.astype(np.float16),
    )
    row = {"case": case.id, "patient": case.patient, "liver": dice(found > 0, truth > 0)}
    return row | {"tumour": lesion_score(found == 2, truth == 2)}


def finish(arguments: argparse.Namespace, rows: list[dict]) -> None:
    result = {"summary": summary(rows), "rows": rows, "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    logger.info("\n%s\n%s", show(rows), json.dumps(result["summary"], indent=1))
    draw(arguments.out, rows, arguments.out / "outlines.png")


def draw(out: Path, rows: list[dict], path: Path) -> None:
    """Outlines of the best, the middle and the worst patient with a tumour: liver grey, true tumour blue, found orange.

    Each in the axial slice that shows most of the tumour; no intensities.
    """
    ill = sorted((r for r in rows if r["tumour"]["voxels"]), key=lambda r: -r["tumour"]["dice"])
    panels = []
    for row in (ill[0], ill[(len(ill) - 1) // 2], ill[-1]):
        with np.load(out / f"{row['case']}.npz") as kept:
            truth, found = kept["truth"], kept["found"]
        k = int((truth == 2).sum((0, 1)).argmax())
        i, j = (np.flatnonzero((truth[:, :, k] > 0).any(axis)) for axis in (1, 0))
        where = np.s_[max(i[0] - 8, 0) : i[-1] + 9, max(j[0] - 8, 0) : j[-1] + 9, k]
        panel = np.full((480, 480, 3), 255, np.uint8)
        shown = ((truth > 0, (150, 150, 150)), (truth == 2, (30, 90, 220)), (found == 2, (240, 120, 0)))
        for mask, colour in shown:
            # the patient's right on the left, front at the top
            big = np.kron(mask[where].T[::-1, ::-1], np.ones((3, 3), bool))[:480, :480]
            panel[: big.shape[0], : big.shape[1]][big & ~binary_erosion(big, iterations=2)] = colour
        panels.append(panel)
    Image.fromarray(np.concatenate(panels, 1)).quantize(8).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["first", "second", "joined", "whole"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("work/lits_cache"))
    parser.add_argument("--first", type=Path, help="folder of the first stage to join")
    parser.add_argument("--second", type=Path, help="folder of the second stage to join")
    parser.add_argument("--labelled", type=int, default=8)
    parser.add_argument("--rotation", type=int, default=1, choices=range(1, len(ROTATIONS) + 1))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    conf = {"labels": "liver,tumour", "nested": "tumour:liver", "modality": "ct", "ssl_method": "supervised"}
    conf |= {"nested_fraction": "0.6"}
    settings = load_settings(conf | dict(pair.split("=", 1) for pair in arguments.conf), env={})[0]
    torch.set_num_threads(settings.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
    arguments.out.mkdir(parents=True, exist_ok=True)
    {"first": first_only, "second": second_only, "joined": joined, "whole": whole}[arguments.what](arguments, settings)


if __name__ == "__main__":
    main()
