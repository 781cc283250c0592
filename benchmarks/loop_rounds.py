"""A whole round as an arm of bench_loop.py: a studies folder with the labelled and unlabelled scans of a set.

All human labels are trained on (``validation_fraction`` 0): with one to eight of them, cross-fitting judges the masks.
SAM is the small one of the package. What is scored is the round's retrained model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import FINAL, ORIGINAL
from aslseg.compute.overlap import dice
from aslseg.settings import load_settings
from aslseg.types import Volume
from aslseg.volume.io import read_image, write_image, write_label

RETRAIN, SAM, ADAPTER = 0.75, 0.15, 0.3
"""Steps of a round's other trainings as parts of those of the SSL model: 1500, 300 and 600 of 2000 by default."""
RECIPES: dict[str, dict[str, str]] = {
    "aslseg": {},
    # as in its paper every mask is used, with the weight of a human label
    "cfr": {"promote_floor": "0", "promote_weight": "1"},
    "self_training": {"promote_floor": "0", "promote_weight": "1"},
    "supervised": {},
}
SPENT = {"cfr": 1 + SAM}
"""Units that a recipe which retrains for all that is left has spent before."""


def native_label(case: Prepared) -> np.ndarray:
    """The true label (i, j, k) uint8 on the scan's own grid."""
    return np.rint(case.grid.to_native(np.asarray(case.label, np.float32))).astype(np.uint8)


def conf_of(conf: dict[str, str], recipe: str, units: float, steps: int) -> dict[str, str]:
    """Settings of a round.

    Args:
        conf: Of all arms.
        recipe: Of the round.
        units: Steps that it may take in all, in multiples of ``steps``. The others take their defaults.
        steps: Training steps of the SSL model.
    """
    retrain = units - SPENT[recipe] if recipe in SPENT else RETRAIN
    trainings = {"ssl": 1, "retrain": retrain, "sam": SAM, "adapter": ADAPTER}
    counts = {f"{name}_iterations": str(max(1, round(part * steps))) for name, part in trainings.items()}
    return {"validation_fraction": "0", "min_free_gb": "0", "recipe": recipe} | RECIPES[recipe] | counts | conf


def run_one_round(
    folder: Path,
    scans: Sequence[tuple[Prepared, Volume]],
    labelled: Collection[str],
    conf: dict[str, str],
    recipe: str,
    units: float,
    steps: int,
) -> tuple[Path, dict[str, Any]]:
    """Run a round, or go on with one that was killed; its retrained model, and how good its masks were.

    Args:
        folder: Of the arm.
        scans: Labelled and unlabelled ones. The truth of the latter stays outside of the studies folder.
        labelled: Ids of the labelled ones.
        conf, recipe, units, steps: As for :func:`conf_of`.
    """
    studies = folder / "studies"
    for case, volume in scans if not (folder / "round.json").exists() else ():
        write_image(studies / f"{case.id}.nii.gz", volume)
        if case.id in labelled:
            write_label(studies / "labels" / FINAL / f"{case.id}.nii.gz", native_label(case), volume.affine)
    settings = load_settings(conf_of(conf, recipe, units, steps) | {"model_dir": str(folder / "published")}, env={})[0]
    started = time.monotonic()
    if not (folder / "round.json").exists():
        # here, so that the other arms need no package of SAM's
        from aslseg.rounds.run import run_round

        summary = run_round(studies, settings)
        (folder / "round.json").write_text(json.dumps(summary | {"total_seconds": time.monotonic() - started}))
    summary = json.loads((folder / "round.json").read_text())
    found = {}
    for case, _ in scans:
        path = studies / "labels" / ORIGINAL / f"{case.id}.nii.gz"
        if path.exists() and case.id not in labelled:
            found[case.id] = dice(read_image(path).array > 0, native_label(case) > 0) or 0.0
    return Path(summary["models"]["retrained"]), {
        "source": summary["source"],
        "out_of_fold": summary.get("cross_fitted"),
        "warnings": summary["warnings"],
        "stages": summary["seconds"],
        # of the masks that clients see after the round, which are those of the published model
        "masks": found,
        "learned": {c: found[c] for c in summary["promoted"] if c in found},
        "agreement": {c: a for c, a in summary["agreement"].items() if a is not None},
    }
