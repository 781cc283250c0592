"""Running a round, a single training or a ranking on a studies folder: lock, ledger, cases, progress, clean ends."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aslseg.cases.studies import ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.compute.hardware import resolved
from aslseg.errors import AslsegError, DiskFullError, NoModelError
from aslseg.files import write_json
from aslseg.models.files import ModelSet
from aslseg.models.published import KINDS, find_published
from aslseg.registry import RECIPES
from aslseg.rounds.cases import RoundCases, prepare_cases
from aslseg.rounds.gate import publish_better
from aslseg.rounds.ledger import Entry, Ledger
from aslseg.rounds.lock import round_lock
from aslseg.rounds.masks import sync_label_files
from aslseg.rounds.pipeline import RoundPipeline
from aslseg.rounds.progress import Progress
from aslseg.rounds.recipes.aslseg import rank
from aslseg.settings import Paths, ResolvedSettings, Settings
from aslseg.settings.paths import require_writable
from aslseg.types import ProgressCallback, no_progress
from aslseg.volume.io import require_free_disk

logger = logging.getLogger(__name__)

KEEP_STEPS = 2
UNUSED = {"cfr": ("adapter", "refine")}  # stages that a recipe does without
STALE_SECONDS = 600
FULL = (28, 122)  # ENOSPC, EDQUOT


def run_round(
    studies: Path, settings: Settings, report: ProgressCallback = no_progress, *, paths: Paths | None = None
) -> dict[str, Any]:
    """Run the next round, or go on with the one that was interrupted.

    Steps whose inputs have not changed since are not computed again, so a round that is killed at any point and
    started again ends with the same labels, verdicts and models as one that was not.

    Args:
        studies: The studies folder.
        settings: Frozen for the round.
        report: Called with (done, total, stage=..., eta=..., numbers); may raise to stop the round.
        paths: Where ledger and models lie, if not where the settings say.

    Returns:
        ``round``, ``continued``, ``validation`` (Dice by mask or model), ``source`` and ``shown`` (whose masks were
        promoted, and are shown), ``promoted``, ``agreement`` (by case), ``published`` (a line per model), ``models``
        (this round's files, kept until the round after next), ``warnings``, ``skipped``, ``seconds`` by stage.

    Raises:
        AslsegError: NotEnoughCasesError, RoundRunningError, DiskFullError, TrainingDivergedError, LedgerError.
    """
    settings = resolved(settings)
    require_writable(settings, "home", "model_dir")
    paths = paths or Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    found = read_studies(studies)
    _threads(settings)
    with round_lock(paths.home):
        require_free_disk(paths.home, settings.min_free_gb)
        before = _last_summary(ledger)
        number, continued = ledger.open_round({"settings": settings.model_dump()})
        expected = expected_seconds(found, settings, before)
        expected = {stage: t for stage, t in expected.items() if stage not in UNUSED.get(settings.recipe, ())}
        progress = Progress(paths.home / "progress.json", expected, report, number)
        with _record_outcome(progress, ledger, number):
            _remove_stale_temporaries(paths, found)
            sync_label_files(ledger, found, paths)
            opened = {r.number: r.seq for r in ledger.rounds()}[number]
            team = _team(found, settings, paths, ledger, progress)
            stages = RoundPipeline(paths, settings, ledger, team, progress, opened)
            summary = RECIPES.get(settings.recipe)(stages, number)
            summary |= {
                "round": number,
                "continued": continued,
                "warnings": stages.team.warnings,
                "skipped": stages.team.skipped,
                "seconds": progress.seconds,
                "measured": progress.measured,
            }
            _clean_up(stages, number)
            ledger.close_round(number, summary)
            progress.finish()
    return summary


def train_stage(
    kind: str, studies: Path, settings: Settings, report: ProgressCallback = no_progress, *, paths: Paths | None = None
) -> dict[str, Any]:
    """Train one kind of model, with what it is built on, and publish it if the gate lets it.

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
    paths = paths or Paths(settings, studies)
    ledger, found = Ledger(paths.ledger), read_studies(studies)
    _threads(settings)
    with round_lock(paths.home):
        require_free_disk(paths.home, settings.min_free_gb)
        expected = expected_seconds(found, settings, _last_summary(ledger))
        wanted = ("prepare", *KINDS[: KINDS.index(kind) + 1], "publish")
        progress = Progress(paths.home / "progress.json", {s: expected[s] for s in wanted}, report)
        with _record_outcome(progress, ledger, None):
            stages = RoundPipeline(paths, settings, ledger, _team(found, settings, paths, ledger, progress), progress)
            promoted = stages.promoted_before()
            with progress.stage("ssl") as told:
                ssl = sam = adapter = stages.train_ssl(promoted, told)
            if kind != "ssl":
                with progress.stage("sam") as told:
                    sam = stages.train_sam(told)
            if kind == "adapter":
                with progress.stage("adapter") as told:
                    adapter = stages.train_adapter(sam, told)
            trio = _with_published(ModelSet(ssl, sam, adapter), paths, kind)
            with progress.stage("publish") as told:
                ids = [p.case.id for p in promoted]
                _, lines, dice = publish_better(stages, None, trio, trio.ssl, ids, told, kinds=(kind,))
            progress.finish()
    team = stages.team
    return {
        "published": lines,
        "validation": dice,
        "warnings": team.warnings,
        "skipped": team.skipped,
        "seconds": progress.seconds,
    }


def rank_studies(
    studies: Path, settings: Settings, report: ProgressCallback = no_progress, *, paths: Paths | None = None
) -> dict[str, float]:
    """Agreement of every scan without a human label, with the published models, into the ledger.

    Returns:
        Case to mean agreement, lowest first.

    Raises:
        NoModelError: Nothing is published yet.
    """
    settings = resolved(settings)
    require_writable(settings, "home")
    paths = paths or Paths(settings, studies)
    models = [find_published(paths, kind, check=True) for kind in KINDS]
    ssl, sam, adapter = (m.path if m else None for m in models)
    if ssl is None or sam is None or adapter is None:
        raise NoModelError(f"{studies}: nothing is published yet; run `aslseg round --studies {studies}` first")
    ledger, found = Ledger(paths.ledger), read_studies(studies)
    _threads(settings)
    with round_lock(paths.home):
        expected = expected_seconds(found, settings, _last_summary(ledger))
        wanted = ("prepare", "predict", "redraw", "refine")
        progress = Progress(paths.home / "progress.json", {s: expected[s] for s in wanted}, report)
        with _record_outcome(progress, ledger, None):
            stages = RoundPipeline(paths, settings, ledger, _team(found, settings, paths, ledger, progress), progress)
            waiting = stages.team.waiting
            with progress.stage("predict") as told:
                regions = stages.fill(stages.predict(ssl), waiting, told)
            with progress.stage("redraw") as told:
                redrawn = stages.fill(stages.redraw(sam, regions), waiting, told)
            with progress.stage("refine") as told:
                refined = stages.fill(stages.refine(adapter, redrawn, regions), waiting, told)
            judged = rank(stages, None, ModelSet(ssl, sam, adapter), regions, refined, regions, no_progress)
            progress.finish()
    return dict(sorted(((c, j.agreement.mean) for c, j in judged.items()), key=lambda pair: (pair[1], pair[0])))


def expected_seconds(studies: Studies, settings: ResolvedSettings, before: dict[str, Any]) -> dict[str, float]:
    """What each stage of a round will take: as in the last round, else a guess for two CPU cores."""
    waiting = len(studies.images) - len(studies.final)
    guess = {
        "prepare": 1.0 * len(studies.images),
        "ssl": 0.3 * settings.ssl_iterations,
        "predict": 2.0 * waiting,
        "sam": 0.5 * settings.sam_iterations,
        "redraw": 3.0 * waiting,
        "adapter": 0.3 * settings.adapter_iterations,
        "refine": 1.0 * waiting,
        "rank": 0.5 * waiting,
        "promote": 0.5 * waiting,
        "retrain": 0.3 * settings.retrain_iterations,
        "publish": 5.0,
        "originals": 2.0 * waiting,
    }
    return guess | {s: t for s, t in before.get("measured", {}).items() if s in guess}


def _team(studies: Studies, settings: Settings, paths: Paths, ledger: Ledger, progress: Progress) -> RoundCases:
    before = ledger.validation_patients()
    with progress.stage("prepare") as told:
        team = prepare_cases(studies, settings, paths, before, told)
    new = sorted({c.patient for c in team.validation} - before)
    ledger.append([Entry("validation", details={"patient": p}) for p in new])
    return team


def _with_published(made: ModelSet, paths: Paths, kind: str) -> ModelSet:
    """A single training is judged together with the published models of the other kinds, where there are any."""
    files = {}
    for other in KINDS:
        model = find_published(paths, other)
        files[other] = model.path if model and other != kind else getattr(made, other)
    return ModelSet(**files)


def _last_summary(ledger: Ledger) -> dict[str, Any]:
    done = [r.summary for r in ledger.rounds() if r.summary]
    return done[-1] if done else {}


def _clean_up(stages: RoundPipeline, number: int) -> None:
    """Delete step folders that neither this nor the last round used, and masks that no rollback can need."""
    notes = stages.paths.rounds / "used.json"
    try:
        used: dict[str, list[str]] = json.loads(notes.read_text())
    except (OSError, ValueError):
        used = {}
    used[str(number)] = sorted(stages.steps.used)
    used = {n: used[n] for n in sorted(used, key=int)[-KEEP_STEPS:]}
    write_json(notes, used)
    stages.steps.prune(name for names in used.values() for name in names)
    stages.masks.prune(stages.ledger)


def _remove_stale_temporaries(paths: Paths, studies: Studies) -> None:
    """Delete temporary files of rounds that were killed while writing."""
    for folder in (paths.rounds, paths.home / "masks", paths.home / "original", paths.models):
        for path in folder.rglob(".tmp-*"):
            path.unlink(missing_ok=True)
    for tag in (PSEUDO, ORIGINAL):
        for path in (studies.root / "labels" / tag).glob(".tmp-*"):
            # a server may be writing here at this moment
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)


def _threads(settings: Settings) -> None:
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)


@contextmanager
def _record_outcome(progress: Progress, ledger: Ledger, number: int | None) -> Iterator[None]:
    """Say in the progress file, and for a round in the ledger, how the work ended if it did not end well."""
    try:
        yield
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in FULL
        message = str(error) or type(error).__name__
        if full:
            message = f"disk full while writing in {progress.path.parent}; free some space and run again"
        _quietly(lambda: progress.fail(message))
        if number is not None and isinstance(error, Exception):
            _quietly(lambda: ledger.append([Entry("failed", number, details={"error": message})]))
        if full:
            raise DiskFullError(message) from error
        raise


def _quietly(note: Callable[[], object]) -> None:
    """The first error is the one to be told, not that there was no room to note it."""
    try:
        note()
    except (OSError, AslsegError) as error:
        logger.warning("could not be noted: %s", error)
