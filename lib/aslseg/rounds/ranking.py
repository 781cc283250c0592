"""The scans without a human label by agreement: what is stored is shown, and only what has changed is measured again.

Imports no torch while nothing has to be measured.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from aslseg.cases.studies import read_studies
from aslseg.models.kinds import ModelKind
from aslseg.rounds.ledger.ledger import Ledger, Score
from aslseg.rounds.promotion.stored_scores import stored_scores
from aslseg.settings import Paths, Settings
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
