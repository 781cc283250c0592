"""Limits on the components of nested labels, from the labelled scans of each fold, and model files that hold them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.compute.weights import read_metadata
from aslseg.rounds.cross_fit import CrossFit
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.ssl import specks

logger = logging.getLogger(__name__)


def component_limits(pipeline: RoundPipeline, crossed: CrossFit) -> dict[str, Any]:
    """What components of nested labels must reach (:mod:`aslseg.ssl.specks`), from the out-of-fold maps.

    Returns:
        By label. A label of which the folds find lesions in fewer than two patients has none.
    """
    found, labels = {}, pipeline.labels
    spacing = pipeline.cases.spacing or (1.0, 1.0, 1.0)
    for n, name in enumerate(labels.names):
        if labels.parents[n] is None:
            continue
        scans = []
        for fold in crossed.folds:
            for case in fold.cases:
                truth = np.isin(np.asarray(case.label), labels.members(n))
                scans.append(specks.Scan.of(case.patient, fold.maps(case)[n], truth, spacing))
        limits = specks.fit(scans)
        if limits is not None:
            found[name] = limits
    logger.info("limits on components, from %d folds: %s", len(crossed.folds), found or "none")
    return specks.stored(found)


def limited(pipeline: RoundPipeline, crossed: CrossFit | None, model: Path) -> Path:
    """The file of an SSL model with the limits that the folds give.

    The folds' own models have none: what they find is what the limits are fitted to.

    Args:
        pipeline: The round.
        crossed: The folds; None without.
        model: File of the model.

    Returns:
        Another file, or the same one where there are no limits or the model has one stage only.
    """
    if crossed is None or "stages" not in read_metadata(model):
        return model
    limits = component_limits(pipeline, crossed)
    if not limits:
        return model
    # the inputs of the training among them: the gate reads what a model has learned beside its file
    inputs = json.loads(model.with_name("inputs.json").read_text())
    inputs |= {"ssl": pipeline.cases.hashes(model), "limits": limits}
    known = pipeline.artefacts.result(model)
    return pipeline.artefacts.model("ssl", inputs, lambda out: known | specks.write_limited(model, out, limits))
