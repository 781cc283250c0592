"""How good the served models are on new human labels, scored before any model learns from these: *fresh* labels.

A validation case judges many models, and what is published is what scored best on it: after thirty nights the Dice on
it is 0.05 too high. A fresh label has judged nothing yet, so that the mean over such labels is the Dice that pages and
reports state. Imports no torch until a label is scored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aslseg.cases.studies import ORIGINAL
from aslseg.errors import AslsegError
from aslseg.files import sha256
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.published import manifest
from aslseg.rounds.feedback.corrections import dice_of_kept
from aslseg.rounds.ledger.ledger import Entry, Event, Ledger
from aslseg.settings import Paths, Settings
from aslseg.types import ProgressCallback

if TYPE_CHECKING:
    from aslseg.cases.prepared_case import Prepared
    from aslseg.models.model_set import ModelSet
    from aslseg.rounds.steps.pipeline import RoundPipeline

logger = logging.getLogger(__name__)

FRESH = "fresh"
"""Kind of event: Dice of the served models on a human label that none of them has learned."""
SHOWN = "shown"
"""Beside the kinds of models: the mask that clients were shown before a person saved the label."""
LAST = 20
"""The mean is over so many scans of a label, the newest. With a standard deviation of 0.09 over scans its standard
error is 0.02. With more, models of long ago would count; the scans of the last ten rounds may be one or a hundred."""


def record_fresh(pipeline: RoundPipeline, report: ProgressCallback) -> None:
    """Score the fresh labels of a round by the models that are served, each label once, and note it in the ledger.

    Fresh is a label of a patient whose scans no published model was ever trained on, not even with a promoted mask (how
    good these were is noted as ``checked``), and that has not judged the served models. So a validation case is fresh
    in the first round that sees it. A label that is corrected before a model learns from it is scored again. What
    cannot be scored is passed over with a line in the log.

    Args:
        pipeline: The round, before anything is trained.
        report: Called with (done, total) after each label.

    Raises:
        LedgerError: The ledger cannot be read or written.
    """
    models = _served(pipeline)
    cases = _fresh_cases(pipeline) if models else []
    for done, case in enumerate(cases, 1):
        found = _scores(pipeline, models, case)
        if found:
            details = {"dice": found, "models": models.hashes, "label": case.label_hash}
            pipeline.ledger.append([Entry(FRESH, pipeline.number, case.id, details=details)])
            logger.info("fresh label of %s: Dice of the served models %s", case.id, found)
        report(done, len(cases))


def pooled(events: Iterable[Event], last: int = LAST) -> dict[str, dict[str, dict[str, float]]]:
    """The mean Dice on fresh labels.

    Args:
        events: Of the kind :data:`FRESH`, oldest first. The last one of a scan counts.
        last: So many scans of each label count, the newest.

    Returns:
        Kind of model (or :data:`SHOWN`) to label to ``dice``, the mean, and ``scans``, their number. A scan in which
        neither mask holds a label does not count for it.
    """
    by_case = {e.case: e for e in sorted(events, key=lambda e: e.seq)}
    values: dict[str, dict[str, list[float]]] = {}
    for event in sorted(by_case.values(), key=lambda e: e.seq):
        for kind, dice in event.details["dice"].items():
            for label, value in dice.items():
                if value is not None:
                    values.setdefault(kind, {}).setdefault(label, []).append(value)
    newest = {kind: {label: v[-last:] for label, v in dice.items()} for kind, dice in values.items()}
    return {
        kind: {label: {"dice": sum(v) / len(v), "scans": len(v)} for label, v in dice.items()}
        for kind, dice in newest.items()
    }


def stated(fresh: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of :func:`pooled`, by label what annotators see: the masks that they were shown, or else the SSL model's."""
    found = fresh.get(SHOWN) or fresh.get(ModelKind.SSL.value) or {}
    return {label: dict(about) for label, about in found.items()}


def mean_over_labels(dice: Mapping[str, Mapping[str, float]]) -> tuple[float | None, int]:
    """Of one kind in :func:`pooled`: the mean over its labels, None without any, and the number of scans."""
    means = [about["dice"] for about in dice.values()]
    return (sum(means) / len(means) if means else None), int(max((a["scans"] for a in dice.values()), default=0))


def with_fresh_dice(models: list[dict[str, Any]], settings: Settings, studies: Path | None) -> list[dict[str, Any]]:
    """Published models of a studies folder as plain values, with ``fresh_dice`` and ``fresh_scans`` of each.

    Without the folder there is no ledger to ask, and the models stay as they are.
    """
    if studies is None:
        return models
    fresh = pooled(Ledger(Paths(settings, studies).ledger).events(kinds=(FRESH,)))
    found = ((model, *mean_over_labels(fresh.get(model["kind"], {}))) for model in models)
    return [model | {"fresh_dice": dice, "fresh_scans": scans} for model, dice, scans in found]


def unscored(ledger: Ledger, labelled: Iterable[str]) -> int:
    """How many labelled scans may be fresh, for the estimate of the time."""
    known = {e.case for e in ledger.events(kinds=(FRESH,))}
    served = [e.details["after"] for e in ledger.events(kinds=("published",))]
    known |= {case for models in served for m in models.values() for case in m.get("trained_on", ())}
    return len(set(labelled) - known) if served else 0


def _fresh_cases(pipeline: RoundPipeline) -> list[Prepared]:
    from aslseg.rounds.steps.cases import trained_before

    cases, events = pipeline.cases, pipeline.ledger.events(kinds=(FRESH,))
    scored, labels = {e.case for e in events}, {e.details["label"] for e in events}
    learned = trained_before(pipeline.ledger, pipeline.paths)
    used = {c.patient for c in cases.sources.values() if c.id in learned} | _judges(pipeline)
    new = [
        *(c for c in cases.train if c.label_hash not in labels),
        *(c for c in cases.validation if c.id not in scored),
    ]
    return sorted((c for c in new if c.patient not in used and c.id not in learned), key=lambda c: c.id)


def _judges(pipeline: RoundPipeline) -> set[str]:
    """Patients that validated models already when the last of the served ones was published."""
    published = [e.seq for e in pipeline.ledger.events(kinds=("published",)) if _of_before(pipeline, e)]
    patients = {c.id: c.patient for c in pipeline.cases.sources.values()}
    return pipeline.ledger.validation_patients(patients, published[-1]) if published else set()


def _served(pipeline: RoundPipeline) -> ModelSet:
    """The models that were served when this round began; one that goes on after it has published asks for these too."""
    from aslseg.models.cascade import NEEDS
    from aslseg.models.loaded import load_model
    from aslseg.models.model_set import ModelSet

    files: dict[ModelKind, Path] = {}
    entries = entries_before(pipeline)
    for kind in PUBLISHED_KINDS:
        entry, path = entries.get(kind), pipeline.paths.models / str(entries.get(kind, {}).get("file", "-"))
        if entry is None or not path.is_file() or not set(NEEDS[kind]) <= files.keys():
            continue
        try:
            if sha256(path) == entry["sha256"]:
                load_model(kind, path, pipeline.settings)
                files[kind] = path
        except AslsegError as error:
            logger.warning("new labels are not scored by the published %s model: %s", kind, error)
    return ModelSet(files)


def entries_before(pipeline: RoundPipeline) -> dict[str, dict[str, Any]]:
    """The manifest of the time when the round began, also where the round goes on after it has published."""
    events = pipeline.ledger.events(kinds=("published",)) if pipeline.number else []
    others = [e for e in events if _of_before(pipeline, e)]
    if len(others) == len(events):
        return manifest(pipeline.paths)
    return dict(others[-1].details["after"] if others else events[0].details["before"])


def _of_before(pipeline: RoundPipeline, event: Event) -> bool:
    """Whether an event is not of this round."""
    return pipeline.number is None or event.round != pipeline.number


def _scores(pipeline: RoundPipeline, models: ModelSet, case: Prepared) -> dict[str, dict[str, float | None]]:
    """Dice by kind of model and label; empty where the scan cannot be predicted."""
    found: dict[str, dict[str, float | None]] = {}
    try:
        on_grid: Sequence[Prepared] = pipeline.at_spacing([case], models.spacing)
        for kind in models:
            dice = pipeline.dice_by_label(pipeline.predict(kind, models), on_grid)
            found[kind.value] = {label: value for label, (value, _) in dice.items()}
    except AslsegError as error:
        logger.warning("the new label of %s is not scored: %s", case.id, error)
        return {}
    shown = _dice_of_shown(pipeline, case)
    return found | ({SHOWN: shown} if shown else {})


def _dice_of_shown(pipeline: RoundPipeline, case: Prepared) -> dict[str, float | None] | None:
    """Dice of the mask that rounds drew on a scan; None if there is none, or it is of other labels or another scan."""
    event, source = pipeline.ledger.masks(ORIGINAL).get(case.id), pipeline.cases.sources[case.id]
    if event is None or event.kind != "mask" or source.label is None:
        return None
    about = event.details.get("image"), event.details.get("params", {}).get("label_names")
    if about != (case.image_hash, pipeline.labels.values):
        return None
    try:
        mask = pipeline.masks.path(event.details["sha256"])
        return dice_of_kept(source.image, source.label, mask, pipeline.settings)
    except (AslsegError, ValueError, OSError) as error:
        logger.warning("the mask that was shown of %s was not compared with its new label: %s", case.id, error)
        return None
