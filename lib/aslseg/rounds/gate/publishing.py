"""The publishing gate over a round's cases: what has changed since the published model, and the labels that judge.

No label judges that the published model has learned from. The rules are in :mod:`aslseg.models.gate_rules`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aslseg.models import published
from aslseg.models.gate_rules import Cause
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.models.published import Candidate, Published, gate
from aslseg.rounds.folds.cross_fit import region_dice
from aslseg.rounds.folds.evidence import Evidence, Scored, first_model
from aslseg.rounds.gate.comparisons import (
    Compared,
    case_dice,
    cause_of,
    comparable,
    differences,
    first_entry,
    first_with_its_labels,
    learned_labels,
    not_learned,
    settings_hash,
)
from aslseg.rounds.gate.fresh import entries_before
from aslseg.rounds.label_files.masks import first_kept_event
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.ledger.vetoes import model_vetoes
from aslseg.rounds.steps.artefacts import CachedProbabilities
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.ssl.class_watch import warnings_of
from aslseg.types import ProgressCallback

logger = logging.getLogger(__name__)


def publish_better(
    pipeline: RoundPipeline,
    made: ModelSet,
    retrained: Path,
    promoted: Sequence[str],
    report: ProgressCallback,
    kinds: Sequence[ModelKind] = PUBLISHED_KINDS,
    evidence: Evidence | None = None,
    crossed: Compared | None = None,
) -> tuple[ModelSet, list[str], dict[str, float | None]]:
    """Compare each model with the published one of its kind on the same human labels, and publish what passes the gate.

    SSL comes first; SAM is then judged by the masks that it draws from those of the better SSL model, and the adapter
    by its refinement of these, so that the published models were validated together. These two are judged by the
    validation cases alone: training them once more for each fold takes too long. Validation cases that the
    published model was trained on (it may be older than their role) are left out, even if none remains.

    Args:
        pipeline: The round's cases and steps.
        made: Models of this round before retraining.
        retrained: The SSL model after it.
        promoted: Ids of the promoted cases that the retrained model learned from.
        report: Called with (done, total) after each kind.
        kinds: Only these are published.
        evidence: What human labels say of the masks of this round; None asks the validation cases.
        crossed: What cross-fitting says of the SSL models: :func:`aslseg.rounds.gate.comparisons.crossed_differences`.

    Returns:
        The models that are published now, a line per kind with the reason, and the candidates' validation Dice.
    """
    best, lines, dice, chosen = made.with_file(ModelKind.SSL, _candidate_ssl(pipeline, made, retrained)), [], {}, []
    learned = promoted if best[ModelKind.SSL] == retrained else _promoted_before(best[ModelKind.SSL])
    foreign, before = False, entries_before(pipeline)
    for done, kind in enumerate(kinds, 1):
        current = comparable(pipeline, kind)
        candidate = _score(pipeline, kind, best, current, learned if kind == ModelKind.SSL else ())
        if kind == ModelKind.SSL and current is not None:
            candidate = _held_against_first(pipeline, candidate, current, crossed or Compared())
        accepted, line = _decide(pipeline, candidate, current, foreign)
        if accepted:
            chosen.append(candidate)
        elif current is not None:
            best = best.with_file(kind, current.path)
            foreign = foreign or (kind == ModelKind.SSL and best.spacing != pipeline.cases.spacing)
        if accepted and kind not in before:
            words, warning = first_model(kind, _measured(pipeline, kind, best, evidence))
            line += words
            pipeline.cases.warnings += [warning] if warning else []
        if kind == ModelKind.SSL:
            dice["retrained"] = pipeline.dice(_ssl_maps(pipeline, made, retrained))
            line = _about_ssl(pipeline, line, candidate.path, made, retrained)
        logger.info("%s", line)
        lines.append(line)
        if accepted and _unchecked(pipeline, candidate, current):
            pipeline.cases.warnings.append(line)
        dice[f"published {kind}"] = candidate.dice if accepted else candidate.published_dice
        report(done, len(kinds))
    _serve(pipeline, chosen, lines)
    return best, lines, dice


def _held_against_first(
    pipeline: RoundPipeline, candidate: Candidate, current: Published, crossed: Compared
) -> Candidate:
    """An SSL candidate with what cross-fitting says, and with its differences from the first model with its labels."""
    found = replace(candidate, differences={**candidate.differences, **crossed.published})
    if candidate.cause != Cause.MASKS:
        return found
    first, tries = first_with_its_labels(pipeline, current)
    if first.sha256 == current.sha256:
        return replace(found, tries=tries)
    models = ModelSet({ModelKind.SSL: candidate.path})
    judges = not_learned(pipeline, not_learned(pipeline, pipeline.cases.validation, current), first)
    new = case_dice(pipeline, pipeline.predict(ModelKind.SSL, models), judges)
    old = case_dice(pipeline, pipeline.predict(ModelKind.SSL, models.with_file(ModelKind.SSL, first.path)), judges)
    return replace(found, first={**differences(new, old), **crossed.first}, tries=tries)


def _about_ssl(pipeline: RoundPipeline, line: str, model: Path, made: ModelSet, retrained: Path) -> str:
    """The gate's line on an SSL model with its name in the round, and the classes that it has not learned."""
    name = "retrained" if model == retrained and retrained != made[ModelKind.SSL] else "ssl"
    # the mean over the labels hides a small one
    return "; ".join([f"{line} [{name}]", *warnings_of(pipeline.artefacts.result(model).get("classes", {}))])


def _promoted_before(model: Path) -> list[str]:
    """Ids of the promoted cases that a model of this round was trained on, from what is kept beside its file."""
    return [case for case, *_ in json.loads(model.with_name("inputs.json").read_text())["promoted"]]


def _decide(
    pipeline: RoundPipeline, candidate: Candidate, current: Published | None, foreign: bool
) -> tuple[bool, str]:
    """The gate, and what stands above it."""
    kind = candidate.kind
    if pipeline.cases.hashes(candidate.path) in model_vetoes(pipeline.ledger):
        return False, f"{kind}: not published; this model was rolled back"
    if foreign and kind != ModelKind.SSL:
        return False, f"{kind}: not published; the published ssl works on another spacing"
    first = kind not in entries_before(pipeline)
    return gate(candidate, current, pipeline.settings.gate_tolerance, first)


def _unchecked(pipeline: RoundPipeline, candidate: Candidate, current: Published | None) -> bool:
    """Whether another model than the published one was compared with it on no label at all."""
    if current is None or candidate.dice is not None or candidate.differences:
        return False
    return current.sha256 != pipeline.cases.hashes(candidate.path)


def _measured(
    pipeline: RoundPipeline, kind: ModelKind, models: ModelSet, evidence: Evidence | None
) -> dict[str, list[float]]:
    """Dice by label of a model on human labels that it, or the model of a fold, was not trained on."""
    maps = pipeline.predict(kind, models)
    scored = (Scored(c.id, False, {}, {kind: region_dice(pipeline, maps, c)}) for c in pipeline.cases.validation)
    folds = [one for one in evidence.scored if one.fold and kind in one.dice] if evidence else []
    return Evidence((*scored, *folds), pipeline.labels.names).by_label(kind)


def _serve(pipeline: RoundPipeline, chosen: list[Candidate], lines: list[str]) -> None:
    """Switch the manifest to the chosen models, if that changes anything."""
    before, number = published.manifest(pipeline.paths), pipeline.number
    after = published.stage_files(pipeline.paths, chosen, number)
    if after != before:
        # the ledger comes first, so that a rollback knows everything that was ever served
        noted = [e.details["after"] for e in pipeline.ledger.events(("published",), number=number) if number]
        if noted and _hashes(noted[-1]) == _hashes(after):
            after = noted[-1]  # a run before this one was killed between ledger and manifest
        else:
            details = {"before": before, "after": after, "why": lines}
            pipeline.ledger.append([Entry("published", number, details=details)])
        published.put_manifest(pipeline.paths, after)
    first, _ = first_entry(pipeline.ledger.events(kinds=("published",)), ModelKind.SSL)
    needed = files_of_kept_rounds(pipeline.ledger) | ({first["file"]} if first else set())
    published.prune(pipeline.paths, pipeline.settings.keep_models, needed)


def files_of_kept_rounds(ledger: Ledger) -> set[str]:
    """Model files that a rollback of one of the last rounds needs."""
    first = first_kept_event(ledger)
    events = [e for e in ledger.events(kinds=("published",)) if e.seq > first]
    states = [e.details[when] for e in events for when in ("before", "after")]
    return {entry["file"] for models in states for entry in models.values()}


def _hashes(models: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {kind: entry["sha256"] for kind, entry in models.items()}


def _ssl_maps(pipeline: RoundPipeline, models: ModelSet, ssl: Path) -> CachedProbabilities:
    return pipeline.predict(ModelKind.SSL, models.with_file(ModelKind.SSL, ssl))


def _candidate_ssl(pipeline: RoundPipeline, made: ModelSet, retrained: Path) -> Path:
    """The retrained model, unless it validates worse than the one before.

    Where only promoted masks are new, the gate itself asks whether they help.
    """
    current = comparable(pipeline, ModelKind.SSL)
    if current is not None and cause_of(pipeline, current) == Cause.MASKS:
        return retrained
    before, after = (pipeline.dice(_ssl_maps(pipeline, made, path)) for path in (made[ModelKind.SSL], retrained))
    return made[ModelKind.SSL] if before is not None and after is not None and before > after else retrained


def _score(
    pipeline: RoundPipeline, kind: ModelKind, models: ModelSet, current: Published | None, learned: Sequence[str]
) -> Candidate:
    """A candidate, and the published model beside it on the same validation cases, each on its own working grid."""
    labels, judges = learned_labels(pipeline), pipeline.cases.validation
    fair = judges if current is None else not_learned(pipeline, judges, current)
    maps = pipeline.predict(kind, models)
    candidate = Candidate(
        kind,
        models[kind],
        pipeline.dice(maps, fair),
        None,
        len(fair),
        tuple(sorted([*labels, *learned])),
        labels,
        settings_hash(pipeline),
    )
    if current is None:
        return candidate
    if current.sha256 == models.sha256(kind):
        return replace(candidate, published_dice=candidate.dice)
    other = models.with_file(kind, current.path)
    grid = pipeline.at_spacing(fair, other.spacing if kind == ModelKind.SSL else pipeline.cases.spacing)
    theirs = pipeline.predict(kind, other)
    return replace(
        candidate,
        published_dice=pipeline.dice(theirs, grid),
        cause=cause_of(pipeline, current),
        differences=differences(case_dice(pipeline, maps, fair), case_dice(pipeline, theirs, grid)),
    )
