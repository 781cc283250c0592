"""Tumours of real livers (../shared/data/lits_tumour) at every stage: SSL model, SAM, adaptation network.

    python benchmarks/realdata_lits.py --rotation 1 --labelled 8 --steps 2000 --out work/lits8-1
    python benchmarks/realdata_lits.py --rotation 1 --steps 2000 --conf ssl_method=supervised --out work/sup8-1
    python benchmarks/realdata_lits.py --fold 1/4 --steps 2000 --conf ssl_method=supervised --out work/full1
    python benchmarks/bench_lits.py table work/*/*/result.json --out work

Split by patient; labelled sets, --tumours, --fold and the scores are those of bench_lits.py: Dice by patient, lesion
recall, false lesions a scan, volume error, tumours in healthy livers. Each stage learns from the labelled scans alone
and is given the masks of the stage before it, as in a round, but with synthetic errors alone; the other scans of the
labelled patients are unlabelled.
--crossfit K fits the limits on components to K folds, as a round does. Models that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.adaptation import predict as adapter_predict
from aslseg.adaptation import train as adapter_train
from aslseg.adaptation.faults import Faults
from aslseg.cases.prepared_case import Prepared
from aslseg.rounds.folds.cross_fit import fold_share, folds
from aslseg.sam.modeling import build
from aslseg.sam.predictor.redraw import redraw
from aslseg.sam.training import finetune
from aslseg.settings import Settings
from aslseg.ssl import predict, specks, training
from aslseg.ssl.synthetic_lesions import with_synthetic
from bench_lits import Scored, prepare, shared_arguments
from lits_split import Split, split

logger = logging.getLogger("realdata_lits")
STAGES = ("ssl", "sam", "adapter")


def trained(out: Path, train: Callable[[Path], dict[str, Any]]) -> Path:
    """A model file, trained if it is not there."""
    if not out.exists():
        began = time.monotonic()
        about = train(out) | {"minutes": (time.monotonic() - began) / 60}
        out.with_suffix(".json").write_text(json.dumps(about, indent=1))
        logger.info("%s in %.1f min", out.stem, about["minutes"])
    return out


def train_ssl(
    arguments: argparse.Namespace, settings: Settings, scans: Split, labelled: list[Prepared], name: str, steps: int
) -> Path:
    """Both stages of the SSL model on some of the labelled scans."""
    free = [] if settings.ssl_method == "supervised" else scans.rest
    return trained(
        arguments.out / f"{name}.safetensors",
        lambda out: training.train(labelled, free, settings, out, iterations=steps, spacing=scans.spacing),
    )


def limits(arguments: argparse.Namespace, settings: Settings, scans: Split) -> dict[str, Any]:
    """Limits on components (:mod:`aslseg.ssl.specks`) from labelled scans that a model has not learned."""
    parts = folds(scans.labelled, arguments.crossfit) if arguments.tumours == "labelled" else []
    steps, found = max(1, round(arguments.steps * fold_share(len(parts)))), []
    for n, part in enumerate(parts):
        rest = [c for c in scans.labelled if c.id not in {p.id for p in part}]
        model = predict.load(train_ssl(arguments, settings, scans, rest, f"fold-{n}", steps), settings)
        for case in part:
            truth = np.asarray(case.label) == 2
            region = model.regions(np.asarray(case.image))[1]
            found.append(specks.Scan.of(case.patient, region, truth, scans.spacing or (1.0, 1.0, 1.0)))
    fitted = specks.fit(found)
    logger.info("limits on components: %s", fitted)
    return specks.stored({"tumour": fitted}) if fitted else {}


def run(arguments: argparse.Namespace, settings: Settings) -> None:
    """Train and score all stages."""
    scans = split(arguments, settings)
    out, labels = arguments.out, settings.label_set
    ssl_file = train_ssl(arguments, settings, scans, scans.labelled, "ssl", arguments.steps)
    known = limits(arguments, settings, scans)
    if known:
        ssl_file = trained(out / "limited.safetensors", lambda path: specks.write_limited(ssl_file, path, known))
    learned = with_synthetic(scans.labelled, settings)

    base, errors = build.base_path(settings), Faults(labels)
    sam_file = trained(
        out / "sam.safetensors", lambda path: finetune.train(learned, settings, path, init=base, errors=errors)
    )
    sam = build.load(sam_file, settings)
    adapter_file = trained(out / "adapter.safetensors", lambda path: adapter_train.train(learned, sam, settings, path))
    ssl, adapter = predict.load(ssl_file, settings), adapter_predict.load(adapter_file, settings)
    scored = {stage: scores(arguments, settings, stage) for stage in STAGES}
    for case in scans.test:
        image = np.asarray(case.image)
        regions = ssl.regions(image)
        drawn = redraw(sam, image, regions, settings)
        maps = dict(zip(STAGES, (regions, drawn, adapter.predict(image, drawn, regions)), strict=True))
        for stage, found in maps.items():
            scored[stage].add_mask(case, np.s_[:, :, :], labels.decode(found))
    for one in scored.values():
        one.finish()


def scores(arguments: argparse.Namespace, settings: Settings, stage: str) -> Scored:
    """Where the rows of a stage are gathered; its result.json lies in a folder of its own."""
    given = vars(arguments) | {"arm": f"{arguments.arm}, {stage}", "out": arguments.out / stage}
    given["out"].mkdir(exist_ok=True)
    return Scored(argparse.Namespace(**given), settings, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = shared_arguments(parser).parse_args()
    if arguments.tumours == "unknown":
        parser.error("--tumours unknown is for the second stage alone (bench_lits.py second)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    run(arguments, prepare(arguments, {}))


if __name__ == "__main__":
    main()
