"""The errors of the folds' models, which SAM and the adaptation network learn to correct."""

from __future__ import annotations

import json

import numpy as np

from aslseg.adaptation.faults import Faults, fit_severities
from aslseg.files import write_json
from aslseg.rounds.folds.cross_fit import CrossFit
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.settings import relevant
from aslseg.types import ProgressCallback, no_progress


def learned_faults(pipeline: RoundPipeline, crossed: CrossFit | None, report: ProgressCallback = no_progress) -> Faults:
    """Masks with errors for the training of SAM and the adaptation network.

    The severities of the synthetic ones are fitted to the out-of-fold Dice of all labelled cases. The real masks are
    those of every other fold (:attr:`aslseg.rounds.folds.cross_fit.CrossFit.learned`): a network that has learned to
    turn a mask into the human label says nothing of how good it is on others, so the other folds remain to show that.

    The models of the folds learn from unlabelled scans too, and so differ a little whenever one arrives. Severities and
    trainings are found again all the same, by human labels, folds and settings: they were fitted to masks of models
    that are as good, and to train both networks every night would hold ever new candidates against the same few
    validation cases.

    Args:
        pipeline: The round.
        crossed: The folds; None: synthetic errors of the usual severities.
        report: Called with (0, SAM's iterations, severities=labels that are fitted, of=labels), before its training.
    """
    if crossed is None:
        return Faults(pipeline.labels)
    s, learned = pipeline.settings, [case.id for fold in crossed.learned for case in fold.cases]
    inputs = {
        "human": [[c.id, c.image_hash, c.label_hash] for c in pipeline.cases.train],
        "folds": crossed.parts,
        "iterations": s.ssl_iterations,
        "spacing": pipeline.cases.spacing,
        "settings": relevant(s, "ssl", "predict"),
    }
    path = pipeline.artefacts.folder("severities", inputs) / "most.json"
    if not path.exists():
        rng, cases = np.random.default_rng([s.seed, 7]), pipeline.cases.train

        def shown(done: int, total: int) -> None:
            report(0, s.sam_iterations, severities=done, of=total)

        write_json(path, list(fit_severities(cases, pipeline.labels, crossed.cases, rng, shown)))
    most = tuple(json.loads(path.read_text()))
    real = {case.id: fold.maps for fold in crossed.learned for case in fold.cases}
    return Faults(pipeline.labels, most, real, {"severities": most, "real": learned, "of": path.parent.name})
