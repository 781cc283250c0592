"""What the gate decides on: what has changed since the published model, and Dice of both models on the same labels.

No label judges a model that has learned from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import PSEUDO
from aslseg.errors import AslsegError
from aslseg.models.gate_rules import Cause
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import load_model
from aslseg.models.model_set import ModelSet
from aslseg.models.published import Published, find_published
from aslseg.rounds.folds.cross_fit import CrossFit, folds, share
from aslseg.rounds.folds.cross_retrain import retrained_dice
from aslseg.rounds.folds.fold_share import fold_share
from aslseg.rounds.gate.fresh import entries_before
from aslseg.rounds.ledger.ledger import Event
from aslseg.rounds.ledger.vetoes import mask_vetoes
from aslseg.rounds.steps.artefacts import CachedProbabilities
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.sam.modeling.build import base_path
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """Dice of a round's SSL model minus Dice of others, by cross-fitting on labels of the training, by case.

    Attributes:
        published: Of the published model.
        first: Of the first one with its labels and settings; empty where that is the published one.
    """

    published: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)


def comparable(pipeline: RoundPipeline, kind: ModelKind) -> Published | None:
    """The model of a kind that was published when the round began, if the current settings can load it.

    A round that goes on after it has published is compared with this one too, so that it decides the same again.
    """
    current = find_published(pipeline.paths, kind, check=True, entries=entries_before(pipeline))
    if current is None:
        return None
    try:
        load_model(kind, current.path, pipeline.settings)
    except AslsegError as error:
        logger.warning("the published %s model cannot be compared: %s", kind, error)
        return None
    return current


def learned_labels(pipeline: RoundPipeline) -> dict[str, str]:
    """The human labels that a round learns from: case to hash."""
    return {c.id: c.label_hash for c in sorted(pipeline.cases.train, key=lambda c: c.id)}


def settings_hash(pipeline: RoundPipeline) -> str:
    """Hash of everything that people set and that the published models depend on, besides scans and labels."""
    s, files = pipeline.settings, [base_path(pipeline.settings), Path(pipeline.settings.sam_base or "-")]
    retraining = [
        s.recipe,
        s.retrain_from,
        s.promote_weight,
        s.disagreement_weight,
        s.uncertainty_weight,
        s.floors,
        # they fit the limits on components, and make the errors that SAM and the adaptation network learn to correct
        s.most_folds,
    ]
    hashes = [pipeline.cases.hashes(f) if f.is_file() else None for f in files]
    text = json.dumps([pipeline.training_settings(), retraining, hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cause_of(pipeline: RoundPipeline, current: Published) -> Cause:
    """What has changed since the published model; labels count before settings."""
    labels = learned_labels(pipeline)
    if current.labels is None:  # published by a version that noted no hashes
        return Cause.LABELS if labels.keys() - set(current.labelled or current.trained_on) else Cause.SETTINGS
    if current.labels != labels or _taken_back(pipeline, current):
        return Cause.LABELS
    return Cause.MASKS if current.settings == settings_hash(pipeline) else Cause.SETTINGS


def _taken_back(pipeline: RoundPipeline, current: Published) -> bool:
    """Whether people took back a mask that the published model learned from."""
    masks, vetoes = pipeline.ledger.masks(PSEUDO, before=pipeline.opened), mask_vetoes(pipeline.ledger)
    return any(case in vetoes and case in masks and masks[case].kind == "removed" for case in current.trained_on)


def crossed_differences(
    pipeline: RoundPipeline,
    crossed: CrossFit,
    retrained: Path,
    promoted: Collection[str],
    report: ProgressCallback,
    unknown: tuple[str, ...] = (),
) -> Compared:
    """Compare the round's SSL model with the published one by cross-fitting on labels of the training.

    Where the published model learned the same human labels, the folds' models are retrained with the promoted cases of
    each (:mod:`aslseg.rounds.folds.cross_retrain`), and with those of the first model with these labels. If these are
    the same cases, cross-fitting sees no difference.

    Where it learned others, the folds of this round are compared with those of the round that published it, on the
    labels that both rounds have: models of as many folds, trained for as many steps, without promoted masks, say what
    the other labels give. Labels that are new to it are scored by it and by the fold's model that has not seen them;
    but only where that one has learned at least as many labels, and for as many steps as the round's model.

    Args:
        pipeline: The round.
        crossed: The folds.
        retrained: The SSL model of the round.
        promoted: Ids of the promoted cases that it was trained on.
        report: Called with (step, steps) of all trainings.
        unknown: Nested labels of which the promoted masks say nothing.

    Returns:
        Nothing where nothing can be compared, or where settings alone have changed.
    """
    current = comparable(pipeline, ModelKind.SSL)
    if current is None or current.sha256 == pipeline.cases.hashes(retrained):
        return Compared()
    if cause_of(pipeline, current) == Cause.SETTINGS:
        return Compared()
    labels = learned_labels(pipeline)
    if current.labels == labels:
        first, _ = first_with_its_labels(pipeline, current)
        others = [set(model.trained_on) - labels.keys() for model in (current, first)]
        if others[0] == set(promoted):
            return Compared()
        parts = [promoted, *(others if first.sha256 != current.sha256 else others[:1])]
        new, *old = (
            retrained_dice(pipeline, crossed, cases, share(report, n, len(parts)), unknown)
            for n, cases in enumerate(parts)
        )
        return Compared(*(differences(new, dice) for dice in old))
    return Compared(_with_other_labels(pipeline, crossed, current))


def _with_other_labels(pipeline: RoundPipeline, crossed: CrossFit, current: Published) -> dict[str, float]:
    """What cross-fitting says where the published model learned other labels, or the same drawn otherwise."""
    cases = _new_to(pipeline, crossed, current)
    models = ModelSet({ModelKind.SSL: current.path})
    old = case_dice(pipeline, pipeline.predict(ModelKind.SSL, models), pipeline.at_spacing(cases, models.spacing))
    old |= _crossed_before(pipeline, crossed, current)
    new: dict[str, float] = {}
    for part, maps in zip(crossed.parts, crossed.maps, strict=True):
        new |= case_dice(pipeline, maps, [c for c in pipeline.cases.train if c.id in part and c.id in old])
    return differences(new, old)


def first_with_its_labels(pipeline: RoundPipeline, current: Published) -> tuple[Published, int]:
    """The model that was published first with the human labels and settings of the published one, and the tries.

    Nights without a new label hold all their candidates against this model, so that small losses do not add up.

    Returns:
        The model, or the published one where its file is gone; and the number of candidates since, with the one of
        this round.
    """
    events = pipeline.ledger.events(kinds=("published",))
    events = [e for e in events if pipeline.number is None or e.round != pipeline.number]
    entry, seq = first_entry(events, current.kind)
    first = find_published(pipeline.paths, current.kind, entries={current.kind: entry}) if entry else None
    done = [r for r in pipeline.ledger.rounds() if r.seq > seq and r.number != pipeline.number]
    published = {e.round for e in events}
    # rounds of earlier versions say only whether they have withdrawn masks
    tried = [r for r in done if r.summary.get("rejected", r.summary.get("withdrawn")) or r.number in published]
    return first or current, 1 + len(tried)


def first_entry(events: Sequence[Event], kind: ModelKind) -> tuple[dict[str, Any] | None, int]:
    """What the manifest said of the first model with the labels and settings of the last one, and the event's place.

    Args:
        events: Of models that were published, oldest first.
        kind: Kind of model.

    Returns:
        None and 0 where none is published.
    """
    found: dict[str, Any] | None = None
    seq = 0
    for event in reversed(events):
        entry = event.details["after"].get(kind)
        same = found is None or (
            entry is not None and all(entry.get(k) == found.get(k) for k in ("labels", "settings"))
        )
        if entry is None or not same:
            break
        found, seq = entry, event.seq
    return found, seq


def _crossed_before(pipeline: RoundPipeline, crossed: CrossFit, current: Published) -> dict[str, float]:
    """Out-of-fold Dice in the round that published a model, of labels that have not changed since.

    Empty where that round had another number of folds, whose models were trained for other steps, or other settings.
    """
    if current.round is None or current.labels is None or current.settings != settings_hash(pipeline):
        return {}
    row = next((r for r in pipeline.ledger.rounds() if r.number == current.round), None)
    found = row.summary.get("out_of_fold", {}) if row else {}
    if found.get("folds") != len(folds(pipeline.cases.train, pipeline.settings.most_folds)):
        return {}
    same = {case for case, digest in learned_labels(pipeline).items() if current.labels.get(case) == digest}
    by_case = {case: [v for v in dice.values() if v is not None] for case, dice in found["cases"].items()}
    return {case: float(np.mean(values)) for case, values in by_case.items() if case in same and values}


def not_learned(pipeline: RoundPipeline, cases: Iterable[Prepared], current: Published) -> list[Prepared]:
    """Those of some cases of whose patients the published model has learned nothing."""
    known = {c.patient for c in pipeline.cases.sources.values() if c.id in current.trained_on}
    return [c for c in cases if c.id not in current.trained_on and c.patient not in known]


def case_dice(pipeline: RoundPipeline, maps: CachedProbabilities, cases: Iterable[Prepared]) -> dict[str, float]:
    """Mean Dice over the labels of each case; one in which neither mask holds anything is left out."""
    found = {c.id: pipeline.dice(maps, [c]) for c in cases}
    return {case: value for case, value in found.items() if value is not None}


def differences(new: dict[str, float], old: dict[str, float]) -> dict[str, float]:
    """New minus old, for the cases that both have."""
    return {case: new[case] - old[case] for case in sorted(new.keys() & old.keys())}


def _new_to(pipeline: RoundPipeline, crossed: CrossFit, current: Published) -> list[Prepared]:
    """Labelled cases of patients that the published model has not seen, where the fold's model has learned enough."""
    if fold_share(len(folds(pipeline.cases.train, pipeline.settings.most_folds))) < 1:
        return []
    cases, least = pipeline.cases.train, len(current.trained_on if current.labelled is None else current.labelled)
    judged = {case for part in crossed.parts if len(cases) - len(part) >= least for case in part}
    return [c for c in not_learned(pipeline, cases, current) if c.id in judged]
