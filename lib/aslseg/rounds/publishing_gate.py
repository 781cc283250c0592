"""The publishing gate over a round's cases: no published model is replaced by one that validates worse."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from aslseg.cases.prepared_case import Prepared
from aslseg.errors import AslsegError
from aslseg.models import published
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.loaded import load_model
from aslseg.models.model_set import ModelSet
from aslseg.models.published import Candidate, Published, gate
from aslseg.rounds.artefacts import CachedProbabilities
from aslseg.rounds.cross_fit import region_dice
from aslseg.rounds.evidence import Evidence, Scored, first_model
from aslseg.rounds.ledger import Entry, Ledger
from aslseg.rounds.masks import first_kept_event
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.rounds.vetoes import model_vetoes
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
) -> tuple[ModelSet, list[str], dict[str, float | None]]:
    """Compare each model with the published one of its kind on the same validation cases, and publish the better.

    SSL comes first; SAM is then judged by the masks that it draws from those of the better SSL model, and the adapter
    by its refinement of these, so that the published models were validated together. Validation cases that the
    published model was trained on (it may be older than their role) are left out, even if none remains.

    Args:
        pipeline: The round's cases and steps.
        made: Models of this round before retraining.
        retrained: The SSL model after it.
        promoted: Ids of the promoted cases that it was trained on.
        report: Called with (done, total) after each kind.
        kinds: Only these are published.
        evidence: What human labels say of the masks of this round; None asks the validation cases.

    Returns:
        The models that are published now, a line per kind with the reason, and the candidates' validation Dice.
    """
    best, lines, dice, chosen = made.with_file(ModelKind.SSL, _better_ssl(pipeline, made, retrained)), [], {}, []
    foreign, vetoes, before = False, model_vetoes(pipeline.ledger), _published_before(pipeline)
    for done, kind in enumerate(kinds, 1):
        current = _comparable(pipeline, kind)
        candidate = _score(pipeline, kind, best, current, promoted if kind == ModelKind.SSL else ())
        accepted, line = gate(candidate, current, pipeline.settings.gate_tolerance)
        if best.sha256(kind) in vetoes:
            accepted, line = False, f"{kind}: not published; this model was rolled back"
        if foreign and kind != ModelKind.SSL:
            accepted, line = False, f"{kind}: not published; the published ssl works on another spacing"
        if accepted:
            chosen.append(candidate)
        elif current is not None:
            best = best.with_file(kind, current.path)
            foreign = kind == ModelKind.SSL and best.spacing != pipeline.cases.spacing
        if accepted and kind not in before:
            words, warning = first_model(kind, _measured(pipeline, kind, best, evidence))
            line += words
            pipeline.cases.warnings += [warning] if warning else []
        if kind == ModelKind.SSL:
            name = "retrained" if candidate.path == retrained and retrained != made[ModelKind.SSL] else "ssl"
            dice["retrained"] = pipeline.dice(_ssl_maps(pipeline, made, retrained))
            line += f" [{name}]"
            # the mean over the labels hides a small one
            line = "; ".join([line, *warnings_of(pipeline.artefacts.result(candidate.path).get("classes", {}))])
        logger.info("%s", line)
        lines.append(line)
        if accepted and current is not None and candidate.dice is None:
            pipeline.cases.warnings.append(line)
        dice[f"published {kind}"] = candidate.dice if accepted else candidate.published_dice
        report(done, len(kinds))
    _serve(pipeline, chosen, lines)
    return best, lines, dice


def _published_before(pipeline: RoundPipeline) -> Collection[str]:
    """The kinds that were published before this round; one that was killed may have published some already."""
    number = pipeline.number
    events = pipeline.ledger.events(kinds=("published",), number=number) if number else []
    return events[0].details["before"] if events else published.manifest(pipeline.paths)


def _measured(
    pipeline: RoundPipeline, kind: ModelKind, models: ModelSet, evidence: Evidence | None
) -> dict[str, list[float]]:
    """Dice by label of a model on human labels that it, or the model of a fold, was not trained on."""
    maps = pipeline.predict(kind, models)
    scored = (Scored(c.id, False, {}, {kind: region_dice(pipeline, maps, c)}) for c in pipeline.cases.validation)
    folds = [one for one in evidence.scored if one.fold] if evidence else []
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
    published.prune(pipeline.paths, pipeline.settings.keep_models, files_of_kept_rounds(pipeline.ledger))


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


def _better_ssl(pipeline: RoundPipeline, made: ModelSet, retrained: Path) -> Path:
    """The retrained model, unless it validates worse than the one before."""
    before, after = (pipeline.dice(_ssl_maps(pipeline, made, path)) for path in (made[ModelKind.SSL], retrained))
    return made[ModelKind.SSL] if before is not None and after is not None and before > after else retrained


def _comparable(pipeline: RoundPipeline, kind: ModelKind) -> Published | None:
    """The published model of a kind, if the current settings can load it."""
    current = published.find_published(pipeline.paths, kind, check=True)
    if current is None:
        return None
    try:
        load_model(kind, current.path, pipeline.settings)
    except AslsegError as error:
        logger.warning("the published %s model cannot be compared: %s", kind, error)
        return None
    return current


def _score(
    pipeline: RoundPipeline, kind: ModelKind, models: ModelSet, current: Published | None, promoted: Sequence[str]
) -> Candidate:
    """Dice of a candidate and of the published model on the same cases, each on its own working grid."""
    labelled = [c.id for c in pipeline.cases.train]
    fair = [c for c in pipeline.cases.validation if current is None or c.id not in current.trained_on]
    dice = pipeline.dice(pipeline.predict(kind, models), fair)
    theirs = None
    if current is not None and current.sha256 == models.sha256(kind):
        theirs = dice
    elif current is not None:
        other = models.with_file(kind, current.path)
        theirs = pipeline.dice(pipeline.predict(kind, other), _on_grid(pipeline, kind, other, fair))
    learned = tuple(sorted([*labelled, *promoted]))
    return Candidate(kind, models[kind], dice, theirs, len(fair), learned, tuple(sorted(labelled)))


def _on_grid(pipeline: RoundPipeline, kind: ModelKind, models: ModelSet, cases: list[Prepared]) -> list[Prepared]:
    wanted = {c.id for c in cases}
    spacing = models.spacing if kind == ModelKind.SSL else pipeline.cases.spacing
    return [c for c in pipeline.validation_at(spacing) if c.id in wanted]
