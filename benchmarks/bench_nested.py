"""Tumours of phantoms: the SSL model of two stages, or of one, on unlabelled phantoms.

python benchmarks/bench_nested.py --steps 800 --conf nested_fraction=0.6
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from aslseg.cases.prepare import prepare, working_spacing
from aslseg.cases.prepared_case import Prepared
from aslseg.compute.overlap import dice
from aslseg.settings import load_settings
from aslseg.ssl import predict, training
from aslseg.volume.phantom import make_phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/nested"))
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--labelled", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
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
    model, rows = predict.load(out, settings), []
    for case in cases[arguments.labelled :]:
        found = settings.label_set.decode(model.regions(case.image))
        pairs = zip(settings.label_set.regions(found), settings.label_set.regions(np.asarray(case.label)), strict=True)
        rows.append([dice(a, b) for a, b in pairs])
    means = {
        name: float(np.mean([d for d in column if d is not None]))
        for name, column in zip(settings.labels, zip(*rows, strict=True), strict=True)
    }
    result = {"dice": means, "rows": rows, "minutes": (time.monotonic() - began) / 60, "classes": trained["classes"]}
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    logging.getLogger("bench_nested").info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
