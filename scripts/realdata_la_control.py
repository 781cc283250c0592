"""Why retraining helps or not: the retraining step of realdata_la.py again, with other labels for the promoted cases.

``restart`` goes on without promoted cases, ``truth`` gives them their true labels (which no round ever sees): what the
step itself does, and what it could do with perfect pseudo-labels. After realdata_la.py, six minutes each on one core:

    python scripts/realdata_la_control.py --out work/la --ssl work/la/studies/.aslseg/rounds/steps/ssl-X/ssl.safetensors
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from aslseg.agreement.measures import dice
from aslseg.cases.prepare import PreparedStore
from aslseg.cases.split import split
from aslseg.cases.studies import read_studies
from aslseg.rounds.cascade import Cascade
from aslseg.settings import Settings, load_settings
from aslseg.ssl import engine
from aslseg.types import Prepared
from aslseg.volume.io import read_image, read_label
from realdata import scans


def with_truth(cases: list[Prepared], truth: Path, sources: dict[str, Path], settings: Settings) -> list[Prepared]:
    """Promoted cases as the round trains on them, but with their true labels and full voxel weights."""
    found = []
    for case in cases:
        volume, labels = read_image(sources[case.id]), settings.label_set
        label = case.grid.label_to_working(read_label(truth / f"{case.id}.nii.gz", volume, labels), labels)
        weight = np.ones(label.shape, np.float16)
        found.append(replace(case, label=label, weight=settings.promote_weight, voxel_weight=weight))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/la"))
    parser.add_argument("--ssl", type=Path, required=True, help="the SSL model that retraining started from")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = json.loads((arguments.out / "result.json").read_text())
    settings = load_settings(result["settings"], env={})[0]
    torch.set_num_threads(settings.threads or 1)
    studies = read_studies(arguments.out / "studies")
    cases = split(studies, settings.validation_fraction)
    store = PreparedStore(arguments.out / "studies" / ".aslseg" / "cache", settings, None)
    train, free = (store.load_all([c for c in cases if c.role == r])[0] for r in ("train", "unlabelled"))
    chosen = [c for c in free if c.id in result["rounds"][0]["promoted"]]
    known = {"restart": [], "truth": with_truth(chosen, arguments.out / "truth", studies.images, settings)}
    for name, promoted in known.items():
        model = arguments.out / f"control_{name}.safetensors"
        steps = settings.retrain_iterations
        engine.train([*train, *promoted], free, settings, model, iterations=steps, spacing=None, init=arguments.ssl)
        cascade, found = Cascade.load({"ssl": model}, settings), []
        for case, path in scans(arguments.out / "heldout").items():
            volume = read_image(path)
            true = read_label(arguments.out / "truth" / f"{case}.nii.gz", volume, settings.label_set)
            found.append(dice(cascade.masks(volume)["ssl"] == 1, true == 1))
        logging.info("%s: held-out Dice %.3f ± %.3f", name, np.mean(found), np.std(found, ddof=1))


if __name__ == "__main__":
    main()
