"""Limits on the components of nested labels, from the labelled scans of each fold, and model files that hold them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.relative import half_range
from aslseg.compute.weights import read_metadata
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.cross_fit import CrossFit, Fold, cross_fit, folds
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.settings import Settings
from aslseg.ssl import specks
from aslseg.ssl.nested import NATIVE
from aslseg.types import Labels

logger = logging.getLogger(__name__)

FoldScans = dict[str, list[specks.Scan]]
"""The scans of a fold by nested label."""


def depends_on_folds(kind: ModelKind, settings: Settings) -> bool:
    """Whether a model of a round has limits on components, or learned to correct the folds' errors."""
    return settings.recipe == "aslseg" and (kind != ModelKind.SSL or half_range(settings) is not None)


def cross_fitted(pipeline: RoundPipeline) -> CrossFit | None:
    """The stage ``folds``: the models of the folds, with limits on components; None where there are no folds."""
    if not folds(pipeline.cases.train, pipeline.settings.most_folds):
        return None
    with pipeline.progress.stage("folds") as report:
        return with_limits(pipeline, cross_fit(pipeline, report))


def with_limits(pipeline: RoundPipeline, crossed: CrossFit | None) -> CrossFit | None:
    """The folds, whose models have limits on components of nested labels as the published model has.

    The limits of a fold are fitted to the masks of all others, so that no label judges masks whose limits were chosen
    by it. A fold of which the others find too few lesions has none, and its masks are judged without.

    Args:
        pipeline: The round.
        crossed: The folds, without limits.

    Returns:
        Others, with the limits from all folds (:mod:`aslseg.ssl.specks`); the same ones where there are none or the
        models have one stage only.
    """
    if crossed is None or not all("stages" in read_metadata(fold.model) for fold in crossed.folds):
        return crossed
    scans = [_scans(pipeline, fold) for fold in crossed.folds]
    limits = _fitted(scans)
    logger.info("limits on components, from %d folds: %s", len(scans), limits or "none")
    if not limits:
        return crossed
    found = [_limited_fold(pipeline, fold, _fitted(scans[:n] + scans[n + 1 :])) for n, fold in enumerate(crossed.folds)]
    return CrossFit.scored(pipeline, found, limits)


def limited(pipeline: RoundPipeline, found: CrossFit | Fold | None, model: Path) -> Path:
    """The file of an SSL model with limits on components.

    Args:
        pipeline: The round.
        found: What has the limits: the folds, for a model of all labels, or the fold that it has not seen. None, a
            round without folds: :data:`aslseg.ssl.specks.USUAL` for every nested label, and for a control none.
        model: File of the model.

    Returns:
        Another file, or the same one where there are no limits or the model has one stage only.
    """
    if found is None and not depends_on_folds(ModelKind.SSL, pipeline.settings):
        return model
    limits = _usual(pipeline.labels) if found is None else found.limits
    if not limits or "stages" not in read_metadata(model):
        return model
    # the inputs of the training among them: the gate reads what a model has learned beside its file
    inputs = json.loads(model.with_name("inputs.json").read_text())
    inputs |= {"ssl": pipeline.cases.hashes(model), "limits": limits}
    known = pipeline.artefacts.result(model)
    return pipeline.artefacts.model("ssl", inputs, lambda out: known | specks.write_limited(model, out, limits))


def _usual(labels: Labels) -> dict[str, Any]:
    nested = (name for name, parent in zip(labels.names, labels.parents, strict=True) if parent is not None)
    return specks.stored(dict.fromkeys(nested, specks.USUAL))


def _scans(pipeline: RoundPipeline, fold: Fold) -> FoldScans:
    # as prediction measures components, which does not know the voxels of a scan that is worked on as it is
    labels, spacing = pipeline.labels, pipeline.cases.spacing or NATIVE
    found: FoldScans = {}
    for n, name in enumerate(labels.names):
        if labels.parents[n] is None:
            continue
        found[name] = []
        for case in fold.cases:
            truth = np.isin(np.asarray(case.label), labels.members(n))
            found[name].append(specks.Scan.of(case.patient, fold.maps(case)[n], truth, spacing))
    return found


def _fitted(parts: Sequence[FoldScans]) -> dict[str, Any]:
    names = parts[0] if parts else ()
    pairs = {name: specks.fit([scan for part in parts for scan in part[name]]) for name in names}
    return specks.stored({name: pair for name, pair in pairs.items() if pair is not None})


def _limited_fold(pipeline: RoundPipeline, fold: Fold, limits: Mapping[str, Any]) -> Fold:
    if not limits:
        return fold
    model = limited(pipeline, replace(fold, limits=limits), fold.model)
    maps = pipeline.predict(ModelKind.SSL, ModelSet({ModelKind.SSL: model}))
    return replace(fold, model=model, maps=maps, limits=limits)
