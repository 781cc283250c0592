"""Running a round or a single training on a studies folder: lock, ledger, cases, progress, cleaning up."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aslseg.cases.studies import ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.compute.hardware import resolved
from aslseg.errors import AslsegError, DiskFullError
from aslseg.files import FULL, write_json
from aslseg.models.files import ModelSet
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.published import find_published
from aslseg.registry import RECIPES
from aslseg.rounds.cases import RoundCases, prepare_cases
from aslseg.rounds.gate import publish_better
from aslseg.rounds.ledger import Entry, Ledger
from aslseg.rounds.lock import round_lock
from aslseg.rounds.masks import sync_label_files, unwritable_labels
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.rounds.progress import Progress
from aslseg.rounds.reports import write_report
from aslseg.settings import Paths, ResolvedSettings, Settings
from aslseg.settings.paths import require_writable
from aslseg.types import ProgressCallback, no_progress
from aslseg.volume.io import require_free_disk

logger = logging.getLogger(__name__)

KEEP_ARTEFACTS = 2
"""Rounds whose artefacts are kept."""
UNUSED_STAGES = {"cfr": ("adapter", "refine")}
"""Stages that a recipe does not have."""
STALE_SECONDS = 600


def run_round(
    studies: Path, settings: Settings, report: ProgressCallback = no_progress, *, paths: Paths | None = None
) -> dict[str, Any]:
    """Run the next round, or go on with the one that was interrupted.

    Steps whose inputs have not changed are not computed again, so a round that is killed at any point and started
    again ends with the same labels, verdicts and models as an uninterrupted one.

    Args:
        studies: The studies folder.
        settings: Frozen for the round.
        report: Called with (done, total, stage=..., eta=..., numbers); may raise to stop the round.
        paths: Where ledger and models are; by default where the settings say.

    Returns:
        ``round``, ``continued``, ``validation`` (Dice by mask or model), ``source`` and ``shown`` (whose masks were
        promoted, and are shown), ``promoted``, ``withdrawn`` (promotions of a rejected round), ``dropped`` (cases
        that a person labelled or changed meanwhile, with the reason), ``agreement`` (by case), ``published`` (a line
        per model), ``models`` (this round's files, kept until the round after next), ``warnings``, ``skipped``,
        ``seconds`` by stage, ``ledger`` (number of events before this round was closed, and the hash of the last one).

    Raises:
        AslsegError: NotEnoughCasesError, RoundRunningError, DiskFullError, TrainingDivergedError, LedgerError.
    """
    settings = resolved(settings)
    require_writable(settings, "home", "model_dir")
    paths = paths or Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    found = read_studies(studies)
    _set_threads(settings)
    with round_lock(paths.home):
        require_free_disk(paths.home, settings.min_free_gb)
        ledger.require_whole()
        before = _last_summary(ledger)
        number, continued = ledger.open_round({"settings": settings.model_dump()})
        expected = expected_seconds(found, settings, before)
        expected = {stage: t for stage, t in expected.items() if stage not in UNUSED_STAGES.get(settings.recipe, ())}
        progress = Progress(paths.home / "progress.json", expected, report, number)
        with _record_outcome(progress, ledger, number):
            _remove_stale_temporaries(paths, found)
            paths.remember_models()
            sync_label_files(ledger, found, paths)
            opened = {r.number: r.seq for r in ledger.rounds()}[number]
            cases = _cases(found, settings, paths, ledger, progress)
            pipeline = RoundPipeline(paths, settings, ledger, cases, progress, number, opened)
            summary = RECIPES.get(settings.recipe)(pipeline)
            summary |= {
                "round": number,
                "continued": continued,
                "warnings": cases.warnings + pipeline.not_learned,
                "skipped": cases.skipped,
                "seconds": progress.seconds,
                "measured": progress.measured,
            }
            _clean_up(pipeline, number)
            summary = write_report(paths, ledger, summary)
            ledger.close_round(number, summary)
            progress.finish()
    return summary


def train_stage(
    kind: str,
    studies: Path,
    settings: Settings,
    report: ProgressCallback = no_progress,
    *,
    paths: Paths | None = None,
) -> dict[str, Any]:
    """Train one kind of model, with those that it needs, and publish it if the gate allows it.

    Args:
        kind: ``ssl``, ``sam`` or ``adapter``.
        studies: The studies folder.
        settings: See :class:`Settings`.
        report, paths: As for :func:`run_round`.

    Returns:
        ``published`` (lines), ``validation``, ``warnings``, ``skipped``, ``seconds``.

    Raises:
        AslsegError: As :func:`run_round`.
    """
    settings = resolved(settings)
    require_writable(settings, "home", "model_dir")
    paths, wanted = paths or Paths(settings, studies), ModelKind(kind)
    needed = PUBLISHED_KINDS[: PUBLISHED_KINDS.index(wanted) + 1]
    with opened_pipeline(studies, settings, paths, report, ("prepare", *needed, "publish")) as pipeline:
        progress, promoted = pipeline.progress, pipeline.promoted_before()
        files = {}
        with progress.stage("ssl") as shown:
            files[ModelKind.SSL] = pipeline.train_ssl(promoted, shown)
        if wanted != ModelKind.SSL:
            with progress.stage("sam") as shown:
                files[ModelKind.SAM] = pipeline.train_sam(shown)
        if wanted == ModelKind.ADAPTER:
            with progress.stage("adapter") as shown:
                files[ModelKind.ADAPTER] = pipeline.train_adapter(files[ModelKind.SAM], shown)
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
    studies: Path, settings: ResolvedSettings, paths: Paths, report: ProgressCallback, stages: Sequence[str]
) -> Iterator[RoundPipeline]:
    """Hold the studies folder for work that is no round, and give a pipeline over its cases."""
    ledger, found = Ledger(paths.ledger), read_studies(studies)
    _set_threads(settings)
    with round_lock(paths.home):
        require_free_disk(paths.home, settings.min_free_gb)
        ledger.require_whole()
        expected = expected_seconds(found, settings, _last_summary(ledger))
        progress = Progress(paths.home / "progress.json", {s: expected[s] for s in stages}, report)
        with _record_outcome(progress, ledger, None):
            paths.remember_models()
            cases = _cases(found, settings, paths, ledger, progress)
            yield RoundPipeline(paths, settings, ledger, cases, progress)


def expected_seconds(studies: Studies, settings: ResolvedSettings, before: dict[str, Any]) -> dict[str, float]:
    """Seconds that each stage of a round is expected to take: as in the last round, else a guess for two CPU cores."""
    without_label = len(studies.images) - len(studies.final)
    guess = {
        "prepare": 1.0 * len(studies.images),
        "ssl": 0.3 * settings.ssl_iterations,
        "predict": 2.0 * without_label,
        "sam": 0.5 * settings.sam_iterations,
        "redraw": 3.0 * without_label,
        "adapter": 0.3 * settings.adapter_iterations,
        "refine": 1.0 * without_label,
        "rank": 0.5 * without_label,
        "promote": 0.5 * without_label,
        "retrain": 0.3 * settings.retrain_iterations,
        "publish": 5.0,
        "originals": 2.0 * without_label,
    }
    return guess | {s: t for s, t in before.get("measured", {}).items() if s in guess}


def _cases(studies: Studies, settings: Settings, paths: Paths, ledger: Ledger, progress: Progress) -> RoundCases:
    before = ledger.validation_patients()
    unwritable = unwritable_labels(studies)
    if unwritable:
        logger.warning("%s", unwritable)
    with progress.stage("prepare") as shown:
        cases = prepare_cases(studies, settings, paths, before, shown)
    cases.warnings += [unwritable] if unwritable else []
    new = sorted({c.patient for c in cases.validation} - before)
    ledger.append([Entry("validation", details={"patient": p}) for p in new])
    return cases


def _with_published(made: dict[ModelKind, Path], paths: Paths, kind: ModelKind) -> ModelSet:
    """The trained model with the published ones of the other kinds, as far as these are published."""
    files = dict(made)
    for other in PUBLISHED_KINDS:
        model = find_published(paths, other)
        if model and other != kind:
            files[other] = model.path
    return ModelSet(files)


def _last_summary(ledger: Ledger) -> dict[str, Any]:
    done = [r.summary for r in ledger.rounds() if r.summary]
    return done[-1] if done else {}


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


def _remove_stale_temporaries(paths: Paths, studies: Studies) -> None:
    """Delete temporary files of rounds that were killed while writing."""
    for folder in (paths.rounds, paths.home / "masks", paths.home / "original", paths.reports, paths.models):
        for path in folder.rglob(".tmp-*"):
            path.unlink(missing_ok=True)
    for tag in (PSEUDO, ORIGINAL):
        for path in (studies.root / "labels" / tag).glob(".tmp-*"):
            # a server may be writing here at this moment
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)


def _set_threads(settings: Settings) -> None:
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)


@contextmanager
def _record_outcome(progress: Progress, ledger: Ledger, number: int | None) -> Iterator[None]:
    """Write a failure into the progress file and, for a round, into the ledger."""
    try:
        yield
    except BaseException as error:
        # files that atomic_file does not write (training curves) give the bare error of the operating system
        full = isinstance(error, OSError) and error.errno in FULL
        message = str(error) or type(error).__name__
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
