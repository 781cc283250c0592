"""Tumours of phantoms: the SSL model of two stages, or of one, on unlabelled phantoms, and what follows it.

    python benchmarks/bench_nested.py --steps 800 --conf nested_fraction=0.6
    python benchmarks/bench_nested.py --steps 600 --later plain,relative,both --conf patch_voxels=6e4

--later trains SAM and the adaptation network too, in equal steps: as they were (plain), on relative intensities
(relative), or on these and on synthetic lesions (both). All are given the masks of the same SSL model.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from aslseg.adaptation import train as adapter_train
from aslseg.adaptation.faults import Faults
from aslseg.adaptation.predict import load as load_adapter
from aslseg.cases.prepare import prepare, working_spacing
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.sam.modeling import build
from aslseg.sam.predictor.redraw import redraw
from aslseg.sam.training import finetune
from aslseg.settings import Settings, load_settings
from aslseg.ssl import predict, training
from aslseg.ssl.synthetic_lesions import with_synthetic
from aslseg.volume.phantom import make_phantom

logger = logging.getLogger("bench_nested")

LATER = {
    "plain": {"nested_fraction": 0.0},
    "relative": {"nested_synthetic": 0.0},
    "both": {},
}


def later(
    arm: str, settings: Settings, cases: Sequence[Prepared], labelled: int, regions: Sequence[np.ndarray], out: Path
) -> dict[str, Any]:
    """Train SAM and the adaptation network, and score both on the cases that are not labelled."""
    changed = settings.model_copy(update=LATER[arm])
    began, train = time.monotonic(), with_synthetic(cases[:labelled], changed)

    errors = Faults(settings.label_set)
    finetune.train(train, changed, out / "sam.safetensors", init=build.base_path(changed), errors=errors)
    sam = build.load(out / "sam.safetensors", changed)
    adapter_train.train(train, sam, changed, out / "adapter.safetensors")
    adapter = load_adapter(out / "adapter.safetensors", changed)
    found: dict[str, list[np.ndarray]] = {"sam": [], "adapter": []}
    for case, given in zip(cases[labelled:], regions, strict=True):
        found["sam"].append(redraw(sam, np.asarray(case.image), given, changed))
        found["adapter"].append(adapter.predict(np.asarray(case.image), found["sam"][-1], given))
    minutes = (time.monotonic() - began) / 60
    return {kind: score(maps, cases[labelled:], settings) for kind, maps in found.items()} | {"minutes": minutes}


def score(maps: Sequence[np.ndarray], cases: Sequence[Prepared], settings: Settings) -> dict[str, Any]:
    """Mean Dice by label over the cases, and each case's."""
    rows = []
    for regions, case in zip(maps, cases, strict=True):
        found = settings.label_set.decode(regions)
        pairs = zip(settings.label_set.regions(found), settings.label_set.regions(np.asarray(case.label)), strict=True)
        rows.append([dice(a, b) for a, b in pairs])
    means = {
        name: float(np.mean([d for d in column if d is not None]))
        for name, column in zip(settings.labels, zip(*rows, strict=True), strict=True)
    }
    return {"dice": means, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/nested"))
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--labelled", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--later", default="", help="arms of SAM and the adaptation network, separated by commas")
    parser.add_argument("--conf", action="append", default=[], metavar="KEY=VALUE", help="settings over the defaults")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = load_settings(dict(pair.split("=", 1) for pair in arguments.conf), env={})[0]
    torch.set_num_threads(settings.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
    scans = [make_phantom(arguments.seed, n) for n in range(arguments.cases)]
    spacing = working_spacing([volume for volume, _ in scans[: arguments.labelled]], settings)
    cases = []
    for n, (volume, truth) in enumerate(scans):
        image, grid = prepare(volume, settings, spacing)
        cases.append(Prepared(str(n), str(n), image, grid, grid.label_to_working(truth, settings.label_set)))
    out, began = arguments.out / "ssl.safetensors", time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    trained = training.train(
        cases[: arguments.labelled],
        cases[arguments.labelled :],
        settings,
        out,
        iterations=arguments.steps,
        spacing=spacing,
    )
    model, free = predict.load(out, settings), cases[arguments.labelled :]
    regions = [model.regions(case.image) for case in free]
    result = score(regions, free, settings) | {"classes": trained["classes"]}
    result["minutes"] = (time.monotonic() - began) / 60
    for arm in arguments.later.split(",") if arguments.later else ():
        folder = arguments.out / arm
        folder.mkdir(exist_ok=True)
        result[arm] = later(arm, settings, cases, arguments.labelled, regions, folder)
        logger.info("%s: %s", arm, json.dumps(result[arm]))
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    logger.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
