"""The scans without a human label by agreement: what is stored is shown, and only what has changed is measured again.

Imports no torch while nothing has to be measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

from aslseg.cases.studies import Studies, read_studies
from aslseg.models.kinds import ModelKind
from aslseg.models.published import manifest
from aslseg.rounds.ledger.ledger import Ledger, RoundRow, Score
from aslseg.settings import Paths, Settings, relevant
from aslseg.settings.paths import require_writable
from aslseg.types import ProgressCallback, no_progress

STAGES = {ModelKind.SSL: "predict", ModelKind.SAM: "redraw", ModelKind.ADAPTER: "refine"}


def rank_studies(
    studies: Path, settings: Settings, report: ProgressCallback = no_progress, *, paths: Paths | None = None
) -> dict[str, float]:
    """Agreement of every scan without a human label, from the ledger where it still holds.

    Measured anew, with the published models, and recorded in the ledger are scans that are new or were written since,
    and all scans once other models were published than those of the round that measured them.

    Returns:
        Case to mean agreement, lowest first. Scans that cannot be read have none.

    Raises:
        NoModelError: A scan has to be measured, and not all models are published.
    """
    require_writable(settings, "home")
    paths = paths or Paths(settings, studies)
    found, ledger = read_studies(studies), Ledger(paths.ledger)
    stored, changed = stored_scores(found, ledger, paths, settings)
    if changed:
        _measure(changed, stored, settings, paths, report)
        stored = [score for score in ledger.scores() if score.case not in found.final]
    return {score.case: score.agreement for score in stored}


def stored_scores(
    studies: Studies, ledger: Ledger, paths: Paths, settings: Settings
) -> tuple[list[Score], frozenset[str]]:
    """The scores that still hold, lowest first, and the ids of the scans that have to be measured."""
    rounds = {row.number: row for row in ledger.rounds()}
    published, chosen = manifest(paths), settings_key(settings)
    waiting = {case: path for case, path in studies.images.items() if case not in studies.final}
    kept = [
        score
        for score in ledger.scores()
        if score.case in waiting
        and score.details.get("settings", chosen) == chosen
        and _same_models(score, published, rounds)
        and _older(waiting[score.case], score.time)
    ]
    done = [row for row in rounds.values() if row.state == "done"]
    skipped = _skipped(done[-1], studies, waiting) if done else set()
    return kept, frozenset(waiting) - {score.case for score in kept} - skipped


def settings_key(settings: Settings) -> str:
    """A hash of the settings on which the agreement of given models depends."""
    values = relevant(settings, "predict", "prompts")
    values.pop("patch_voxels")  # how models are trained; and only torch knows what ``auto`` is here
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _same_models(score: Score, published: dict[str, dict[str, Any]], rounds: dict[int, RoundRow]) -> bool:
    """Whether a score is from the published models, or from a round after which nothing else was published."""
    models = score.details.get("models", {})
    if models and models == {kind: published[kind]["sha256"] for kind in models if kind in published}:
        return True
    row = rounds.get(score.round or 0)
    numbers = [entry["round"] for entry in published.values()]
    return row is not None and row.state != "rolled back" and all(n is not None and n <= row.number for n in numbers)


def _older(path: Path, time: str) -> bool:
    """Whether a file was last written or renamed before an ISO time."""
    stat = path.stat()
    return max(stat.st_mtime, stat.st_ctime) <= datetime.fromisoformat(time).timestamp()


def _skipped(row: RoundRow, studies: Studies, waiting: dict[str, Path]) -> set[str]:
    """Scans that a round could not use, while they are as they were and nobody has confirmed them since."""
    reasons, closed, table = row.summary.get("skipped", {}), row.closed or row.opened, studies.root / "patients.csv"
    if table.is_file() and not _older(table, closed):
        return set()
    return {case for case, path in waiting.items() if case in reasons and _older(path, closed)}


def _measure(
    changed: Collection[str], stored: list[Score], settings: Settings, paths: Paths, report: ProgressCallback
) -> None:
    """Predict some scans with the published models, and record their agreement beside the scores that hold."""
    from aslseg.compute.hardware import resolved
    from aslseg.models.cascade import published_files
    from aslseg.rounds.folds.evidence import Floors
    from aslseg.rounds.promotion.promotion import assess
    from aslseg.rounds.promotion.state import RoundState
    from aslseg.rounds.run import opened_pipeline

    assert paths.studies is not None  # noqa: S101 - the command takes no address
    models = published_files(paths, ModelKind.ADAPTER)
    with opened_pipeline(paths.studies, resolved(settings), paths, report, ("prepare", *STAGES.values())) as pipeline:
        cases = [case for case in pipeline.cases.without_label if case.id in changed]
        maps = {}
        for kind, stage in STAGES.items():
            with pipeline.progress.stage(stage) as shown:
                maps[kind] = pipeline.fill(pipeline.predict(kind, models), cases, shown)
        ssl_maps = maps[ModelKind.SSL]
        ended = [row.summary for row in pipeline.ledger.rounds() if row.state == "done"]
        floors = Floors.stored(ended[-1].get("evidence", {}) if ended else {}, pipeline.labels)
        state = RoundState(pipeline, models, ssl_maps, maps[ModelKind.ADAPTER], "ssl", ssl_maps, floors=floors)
        assess(state, no_progress, cases, stored)
        pipeline.progress.finish()
