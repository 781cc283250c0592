"""Which of the ledger's scores still hold: those of scans, models and settings that have not changed since.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from aslseg.cases.studies import Studies
from aslseg.models.published import manifest
from aslseg.rounds.ledger.ledger import Ledger, RoundRow, Score
from aslseg.settings import Paths, Settings, relevant


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
