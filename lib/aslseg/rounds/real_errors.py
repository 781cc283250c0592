"""The errors of the folds' models, which SAM and the adaptation network learn to correct."""

from __future__ import annotations

import json

import numpy as np

from aslseg.adaptation.faults import Faults, fit_severities
from aslseg.files import write_json
from aslseg.rounds.cross_fit import CrossFit
from aslseg.rounds.pipeline import RoundPipeline


def learned_faults(pipeline: RoundPipeline, crossed: CrossFit | None) -> Faults:
    """Masks with errors for the training of SAM and the adaptation network.

    The severities of the synthetic ones are fitted to the out-of-fold Dice of all labelled cases. The real masks are
    those of every other fold (:attr:`aslseg.rounds.cross_fit.CrossFit.learned`): a network that has learned to turn a
    mask into the human label says nothing of how good it is on others, so the other folds remain to show that.

    Args:
        pipeline: The round.
        crossed: The folds; None: synthetic errors of the usual severities.
    """
    if crossed is None:
        return Faults(pipeline.labels)
    inputs = {"folds": [m.folder.name for m in crossed.maps], "dice": crossed.cases, "seed": pipeline.settings.seed}
    path = pipeline.artefacts.folder("severities", inputs) / "most.json"
    if not path.exists():
        rng = np.random.default_rng([pipeline.settings.seed, 7])
        write_json(path, list(fit_severities(pipeline.cases.train, pipeline.labels, crossed.cases, rng)))
    most = tuple(json.loads(path.read_text()))
    real = {case.id: fold.maps for fold in crossed.learned for case in fold.cases}
    maps = {fold.maps.folder.name: [case.id for case in fold.cases] for fold in crossed.learned}
    return Faults(pipeline.labels, most, real, {"severities": most, "real": maps})
