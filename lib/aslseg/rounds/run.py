"""Running a round or a single training on a studies folder: lock, ledger, cases, progress, cleaning up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aslseg.cases.studies import ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.compute.hardware import resolved
from aslseg.errors import AslsegError, DiskFullError, OutOfTimeError
from aslseg.files import FULL, temporary_files, write_json
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.models.published import find_published
from aslseg.registry import RECIPES, REPORTS
from aslseg.rounds.feedback.corrections import record_checked
from aslseg.rounds.feedback.savings import record_compared
from aslseg.rounds.folds.component_limits import cross_fitted, depends_on_folds, limited
from aslseg.rounds.folds.fold_share import fold_share
from aslseg.rounds.folds.real_errors import learned_faults
from aslseg.rounds.gate.fresh import FRESH, pooled, record_fresh, unscored
from aslseg.rounds.gate.publishing import publish_better
from aslseg.rounds.label_files.masks import sync_label_files, unwritable_labels
from aslseg.rounds.ledger.ledger import Entry, Ledger, RoundRow
from aslseg.rounds.ledger.reports import write_report
from aslseg.rounds.ready import make_ready
from aslseg.rounds.scheduling.brake import NO_BRAKE, Brake
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.rounds.scheduling.nights import inputs_hash
from aslseg.rounds.scheduling.progress import Progress, Work, read_progress
from aslseg.rounds.steps.cases import RoundCases, prepare_cases, trained_before
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.settings import Paths, ResolvedSettings, Settings
from aslseg.settings.paths import require_writable
from aslseg.types import ProgressCallback, no_progress

logger = logging.getLogger(__name__)

KEEP_ARTEFACTS = 2
"""Rounds whose artefacts are kept."""
UNUSED_STAGES = {
    "cfr": ("folds", "adapter", "refine", "score", "compare"),
    **dict.fromkeys(
        ("supervised", "self_training"), ("folds", "sam", "redraw", "adapter", "refine", "score", "compare")
    ),
}
"""Stages that a recipe does not have."""
MODEL_STAGES = {"ssl", "folds", "sam", "adapter"}
"""Stages whose results a round has made already if the round before it had the same inputs."""
STORED_STAGES = MODEL_STAGES | {"predict", "redraw", "refine", "score", "retrain", "compare"}
"""Stages whose results are found again."""
STALE_SECONDS = 600


def run_round(
    studies: Path,
    settings: Settings,
    report: ProgressCallback = no_progress,
    *,
    paths: Paths | None = None,
    brake: Brake = NO_BRAKE,
) -> dict[str, Any]:
    """Run the next round, or go on with the one that was interrupted.

    Steps whose inputs have not changed are not computed again, so a round that is killed at any point and started
    again ends with the same labels, verdicts and models as an uninterrupted one.

    Args:
        studies: The studies folder.
        settings: Frozen for the round.
        report: Called with (done, total, stage=..., eta=..., numbers); may raise to stop the round.
        paths: Where ledger and models are; by default where the settings say.
        brake: Pauses the round between its steps, or ends it.

    Returns:
        ``round``, ``continued``, ``validation`` (Dice by mask or model), ``source`` and ``shown`` (whose masks were
        promoted, and are shown), ``classes`` (validation Dice of the shown ones by label), ``promoted``,
        ``decisions`` (on each scan, :func:`aslseg.rounds.promotion.decisions.decide`), ``rejected`` (what was
        retrained is not published), ``withdrawn`` (promotions of a rejected round), ``dropped`` (cases that a person
        labelled or changed meanwhile, with the reason),
        ``agreement`` (by case), ``fresh`` (:func:`aslseg.rounds.gate.fresh.pooled`), ``published`` (a line per model),
        ``models`` (this round's files, kept until the round after next), ``warnings``, ``skipped``, ``seconds`` by
        stage, in all nights that the round took, ``rates`` (seconds for a unit of each stage), ``inputs``
        (:func:`aslseg.rounds.scheduling.nights.inputs_hash`), ``ledger`` (its head before this round was closed).

    Raises:
        AslsegError: NotEnoughCasesError, RoundRunningError, DiskFullError, TrainingDivergedError, LedgerError,
            OutOfTimeError (from the brake; the round stays open, and the next call goes on with it).
    """
    settings = resolved(settings)
    require_writable(settings, "home", "model_dir")
    paths = paths or Paths(settings, studies)
    ledger, found = Ledger(paths.ledger), read_studies(studies)
    with round_lock(paths.home):
        make_ready(paths, settings, ledger)
        number, continued = ledger.open_round({"settings": settings.model_dump(exclude={"report_webhook"})})
        inputs = inputs_hash(found, settings)
        work = expected_work(found, settings, ledger, UNUSED_STAGES.get(settings.recipe, ()))
        before = _progress_of(paths, number) if continued else {}
        kept = _found_stages(before, ledger, inputs)
        progress = Progress(paths.home / "progress.json", work, report, number, kept, brake, before)
        with _record_outcome(progress, ledger, number):
            _tidy_up(paths, found, settings, ledger)
            opened = {r.number: r.seq for r in ledger.rounds()}[number]
            cases = _cases(found, settings, paths, ledger, progress)
            pipeline = RoundPipeline(paths, settings, ledger, cases, progress, number, opened)
            _score_fresh(pipeline)
            summary = RECIPES.get(settings.recipe)(pipeline)
            summary |= {"round": number, "continued": continued, "inputs": inputs} | _about(pipeline)
            row = _close(pipeline, number, summary)
            progress.finish()
        _report("headline", paths, settings, row)
    return row.summary


def train_stage(
    kind: str,
    studies: Path,
    settings: Settings,
    report: ProgressCallback = no_progress,
    *,
    paths: Paths | None = None,
    brake: Brake = NO_BRAKE,
) -> dict[str, Any]:
    """Train one kind of model, with those that it needs, and publish it if the gate allows it.

    It is trained as by a round, with the folds where it depends on them.

    Args:
        kind: ``ssl``, ``sam`` or ``adapter``.
        studies: The studies folder.
        settings: See :class:`Settings`.
        report, paths, brake: As for :func:`run_round`.

    Returns:
        ``published`` (lines), ``validation``, ``warnings``, ``skipped``, ``seconds``.

    Raises:
        AslsegError: As :func:`run_round`.
    """
    settings = resolved(settings)
    require_writable(settings, "home", "model_dir")
    paths, wanted = paths or Paths(settings, studies), ModelKind(kind)
    needed = [kind.value for kind in PUBLISHED_KINDS[: PUBLISHED_KINDS.index(wanted) + 1]]
    with_folds = depends_on_folds(wanted, settings)
    needed[1:1] = ["folds"] if with_folds else []
    with opened_pipeline(studies, settings, paths, report, ("prepare", "fresh", *needed, "publish"), brake) as pipeline:
        progress, promoted = pipeline.progress, pipeline.promoted_before()
        _score_fresh(pipeline)
        files = {}
        with progress.stage("ssl") as shown:
            ssl = pipeline.train_ssl(promoted, shown)
        crossed = cross_fitted(pipeline) if with_folds else None
        files[ModelKind.SSL] = limited(pipeline, crossed, ssl)
        if wanted != ModelKind.SSL:
            with progress.stage("sam") as shown:
                faults = learned_faults(pipeline, crossed, shown)
                files[ModelKind.SAM] = pipeline.train_sam(shown, faults)
        if wanted == ModelKind.ADAPTER:
            with progress.stage("adapter") as shown:
                files[ModelKind.ADAPTER] = pipeline.train_adapter(files[ModelKind.SAM], shown, faults)
        made = _with_published(files, paths, wanted)
        with progress.stage("publish") as shown:
            ids = [p.case.id for p in promoted]
            _, lines, dice = publish_better(pipeline, made, made[ModelKind.SSL], ids, shown, kinds=(wanted,))
        progress.finish()
    return {
        "published": lines,
        "validation": dice,
        "warnings": pipeline.cases.warnings + pipeline.not_learned,
        "skipped": pipeline.cases.skipped,
        "seconds": progress.seconds,
    }


@contextmanager
def opened_pipeline(
    studies: Path,
    settings: ResolvedSettings,
    paths: Paths,
    report: ProgressCallback,
    stages: Sequence[str],
    brake: Brake = NO_BRAKE,
) -> Iterator[RoundPipeline]:
    """Hold the studies folder for work that is no round, and give a pipeline over its cases."""
    ledger, found = Ledger(paths.ledger), read_studies(studies)
    with round_lock(paths.home):
        make_ready(paths, settings, ledger)
        work = expected_work(found, settings, ledger)
        progress = Progress(
            paths.home / "progress.json", {s: work[s] for s in stages if s in work}, report, brake=brake
        )
        with _record_outcome(progress, ledger, None):
            paths.remember_models()
            cases = _cases(found, settings, paths, ledger, progress)
            yield RoundPipeline(paths, settings, ledger, cases, progress)


def _score_fresh(pipeline: RoundPipeline) -> None:
    """Score new human labels by the served models, before anything learns from them."""
    with pipeline.progress.stage("fresh") as report:
        record_fresh(pipeline, report)


def _about(pipeline: RoundPipeline) -> dict[str, Any]:
    """What a summary says of the cases, of new labels and the time."""
    cases, progress = pipeline.cases, pipeline.progress
    return {
        "warnings": [*cases.warnings, *pipeline.not_learned, *pipeline.noted],
        "skipped": cases.skipped,
        "fresh": pooled(pipeline.ledger.events(kinds=(FRESH,))),
        "seconds": progress.spent,
        "measured": progress.measured,
        "rates": progress.rates,
    }


def expected_work(
    studies: Studies, settings: ResolvedSettings, ledger: Ledger, unused: Sequence[str] = ()
) -> dict[str, Work]:
    """What each stage of a round has to do, without those of ``unused``, and how long a unit of it takes.

    That is what it took in the last round that measured it, in which it may have found a part done; before any round,
    a guess for two CPU cores.
    """
    scans, unlabelled = len(studies.images), len(studies.images) - len(studies.final)
    # at least one patient validates
    patients = len({studies.patients[c] for c in studies.final}) - (settings.validation_fraction > 0)
    parts = min(settings.most_folds, patients)
    work = {
        "prepare": Work(scans, 1.0),
        "fresh": Work(unscored(ledger, studies.final), 3.0),
        "ssl": Work(settings.ssl_iterations, 0.3),
        **({"folds": Work(parts * fold_share(parts) * settings.ssl_iterations, 0.3)} if parts > 1 else {}),
        "predict": Work(unlabelled, 2.0),
        "sam": Work(settings.sam_iterations, 0.5),
        "redraw": Work(unlabelled, 3.0),
        "adapter": Work(settings.adapter_iterations, 0.3),
        "refine": Work(unlabelled, 1.0),
        **({"score": Work(len(studies.final), 4.0)} if parts > 1 else {}),
        "rank": Work(unlabelled, 0.5),
        "promote": Work(settings.promote_fraction * unlabelled, 1.0),
        "retrain": Work(settings.retrain_iterations, 0.3),
        # mostly nothing: trainings only where other scans are promoted and no label is new
        **({"compare": Work(0, 0.3)} if parts > 1 else {}),
        "publish": Work(len(PUBLISHED_KINDS), 2.0),
        "originals": Work(unlabelled, 2.0),
    }
    measured: dict[str, float] = {}
    for row in ledger.rounds():
        measured |= row.summary.get("rates", {})
    return {s: replace(w, rate=measured.get(s, w.rate)) for s, w in work.items() if s not in unused}


def _progress_of(paths: Paths, number: int) -> dict[str, Any]:
    """The progress of an earlier run of a round; empty where something else has run since."""
    found = read_progress(paths.home / "progress.json")
    return found if found.get("round") == number else {}


def _found_stages(before: Mapping[str, Any], ledger: Ledger, inputs: str) -> set[str]:
    """Stages whose results are probably on disk: of the run that this one continues, or of a round like this one.

    Args:
        before: Progress of the run that this one continues; empty without one.
        ledger: Of the studies folder.
        inputs: :func:`aslseg.rounds.scheduling.nights.inputs_hash` now.
    """
    done = set(before.get("seconds", ()))
    same = [r.summary.get("inputs") == inputs for r in ledger.rounds() if r.state == "done"]
    return (done & STORED_STAGES) | (MODEL_STAGES if same and same[-1] else set())


def _cases(studies: Studies, settings: Settings, paths: Paths, ledger: Ledger, progress: Progress) -> RoundCases:
    before = ledger.validation_patients(studies.patients)
    unwritable = unwritable_labels(studies)
    if unwritable:
        logger.warning("%s", unwritable)
    with progress.stage("prepare") as shown:
        cases = prepare_cases(studies, settings, paths, before, shown, trained_before(ledger, paths))
    cases.warnings += [unwritable] if unwritable else []
    known = {c for e in ledger.events(kinds=("validation",)) for c in e.details.get("cases", ())}
    new: dict[str, list[str]] = {}
    for case in sorted(cases.validation, key=lambda c: (c.patient, c.id)):
        if case.id not in known:
            new.setdefault(case.patient, []).append(case.id)
    ledger.append([Entry("validation", details={"patient": p, "cases": ids}) for p, ids in new.items()])
    return cases


def _with_published(made: dict[ModelKind, Path], paths: Paths, kind: ModelKind) -> ModelSet:
    """The trained model with the published ones of the other kinds, as far as these are published."""
    files = dict(made)
    for other in PUBLISHED_KINDS:
        model = find_published(paths, other)
        if model and other != kind:
            files[other] = model.path
    return ModelSet(files)


def _close(pipeline: RoundPipeline, number: int, summary: dict[str, Any]) -> RoundRow:
    """Clean up, write the reports and close the round; returns it with its whole summary."""
    ledger, paths = pipeline.ledger, pipeline.paths
    _clean_up(pipeline, number)
    summary = write_report(paths, ledger, summary)
    row = next(r for r in ledger.rounds() if r.number == number)
    row = replace(row, state="done", closed=datetime.now(UTC).isoformat("T", "seconds"), summary=summary, error=None)
    # before the round is closed: one that is killed here is gone on with, and writes it then
    _report("page", paths, pipeline.settings, row)
    ledger.close_round(number, summary)
    return row


def _report(name: str, paths: Paths, settings: Settings, row: RoundRow) -> None:
    """Make one of the reports of a round that is done; no failure here changes that."""
    try:
        REPORTS.get(name)(paths, settings, row)
    except Exception as error:
        reason = error if isinstance(error, AslsegError) else type(error).__name__
        logger.warning(
            "the %s of round %d could not be made (%s); aslseg report makes it again", name, row.number, reason
        )


def _clean_up(pipeline: RoundPipeline, number: int) -> None:
    """Delete artefacts that neither this nor the last round used, and masks that no rollback can need."""
    notes = pipeline.paths.rounds / "used.json"
    try:
        used: dict[str, list[str]] = json.loads(notes.read_text())
    except (OSError, ValueError):
        used = {}
    used[str(number)] = sorted(pipeline.artefacts.used)
    used = {n: used[n] for n in sorted(used, key=int)[-KEEP_ARTEFACTS:]}
    write_json(notes, used)
    pipeline.artefacts.prune(name for names in used.values() for name in names)
    pipeline.masks.prune(pipeline.ledger)


def _tidy_up(paths: Paths, studies: Studies, settings: Settings, ledger: Ledger) -> None:
    """Bring the folder in line with the ledger, and the ledger with what people have saved."""
    _remove_stale_temporaries(paths, studies)
    paths.remember_models()
    sync_label_files(ledger, studies, paths)
    record_checked(paths, settings)
    record_compared(paths, settings)


def _remove_stale_temporaries(paths: Paths, studies: Studies) -> None:
    """Delete temporary files of rounds that were killed while writing."""
    own = (paths.rounds, paths.home / "masks", paths.home / "original", paths.reports, paths.models)
    shared = (studies.root / "labels" / tag for tag in (PSEUDO, ORIGINAL))  # a server may be writing here now
    for path in (*temporary_files(*own), *temporary_files(*shared, seconds=STALE_SECONDS)):
        path.unlink(missing_ok=True)


@contextmanager
def _record_outcome(progress: Progress, ledger: Ledger, number: int | None) -> Iterator[None]:
    """Write a failure into the progress file and, for a round, into the ledger."""
    try:
        yield
    except BaseException as error:
        # files that atomic_file does not write (training curves) give the bare error of the operating system
        full = isinstance(error, OSError) and error.errno in FULL
        message = str(error) or type(error).__name__
        if isinstance(error, OutOfTimeError):
            _attempt(lambda: progress.pause(message))
            raise
        if full:
            message = f"disk full while writing in {progress.path.parent}; free some space and run again"
        _attempt(lambda: progress.fail(message))
        if number is not None and isinstance(error, Exception):
            _attempt(lambda: ledger.append([Entry("failed", number, details={"error": message})]))
        if full:
            raise DiskFullError(message) from error
        raise


def _attempt(note: Callable[[], object]) -> None:
    """Do it if possible; another failure must not hide the first one."""
    try:
        note()
    except (OSError, AslsegError) as error:
        logger.warning("could not be recorded: %s", error)
