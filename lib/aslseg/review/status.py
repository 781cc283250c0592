"""The server's current work and past decisions, as one dictionary of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aslseg.cases.studies import read_studies
from aslseg.errors import AslsegError, LedgerError
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.published import Published, find_published, left_behind
from aslseg.rounds.ledger import Ledger
from aslseg.rounds.progress import read_progress
from aslseg.settings import Paths, Settings

MOST = 50
"""Entries of each list."""


def collect(
    settings: Settings,
    paths: Paths,
    store: dict[str, Any],
    errors: Sequence[dict[str, Any]] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Collect the current round, published models, ranking, promotions, files passed over, and the last errors.

    Args:
        settings: Labels and thresholds.
        paths: The studies folder.
        store: Counts of the datastore (``total``, ``completed``, ``label_tags``).
        errors: Failed training tasks, each with ``model``, ``time`` and its last ``lines``.
        notes: What is unusual about scans that were read.
    """
    ledger, failures = Ledger(paths.ledger), list(errors)
    progress = read_progress(paths.home / "progress.json")
    if progress.get("error"):
        failures.append({"model": "round", "time": progress.get("updated"), "lines": [progress["error"]]})
    try:
        scores, promotions = ledger.scores(), ledger.promotions(active_only=False)
        rounds, loss = ledger.rounds(), ledger.loss()
    except LedgerError as error:
        scores, promotions, rounds, loss = [], [], [], str(error)
    if loss:
        failures.append({"model": "ledger", "time": None, "lines": [loss]})
    last: dict[str, Any] = next((r.summary for r in reversed(rounds) if r.summary), {})
    return {
        "labels": list(settings.label_set.names),
        "progress": progress,
        "models": [_model(kind, find_published(paths, kind)) for kind in PUBLISHED_KINDS],
        "cases": store,
        "problems": [*_problems(paths, ledger), *notes],
        "warnings": [*last.get("warnings", []), *map(_named, last.get("skipped", {}).items())],
        "rounds": [
            {"round": r.number, "state": r.state, "opened": r.opened, "closed": r.closed, "error": r.error}
            for r in reversed(rounds)
        ][:MOST],
        "ranking": [
            {"rank": n + 1, "case": s.case, "agreement": round(s.agreement, 4), "details": s.details}
            for n, s in enumerate(scores[:MOST])
        ],
        "promotions": [
            {"case": p.case, "round": p.round, "time": p.time, "agreement": p.agreement, "status": p.status}
            for p in reversed(promotions)
        ][:MOST],
        "errors": failures[-MOST:],
    }


def _named(skipped: tuple[str, str]) -> str:
    """Why a round left a scan out, with its name."""
    case, reason = skipped
    return reason if reason.startswith((f"{case}:", f"{case}.")) else f"{case}: {reason}"


def _problems(paths: Paths, ledger: Ledger) -> list[str]:
    """What the studies folder holds that is passed over, or why it cannot be listed; and models that lie elsewhere."""
    if paths.studies is None:
        return []
    found = []
    try:
        served = [event.details["after"] for event in ledger.events(kinds=("published",))]
        found += [left_behind(paths, served[-1])] if served else []
        found += read_studies(paths.studies).problems
    except AslsegError as error:
        found.append(str(error))
    return [problem for problem in found if problem]


def _model(kind: ModelKind, entry: Published | None) -> dict[str, Any]:
    if entry is None:
        return {"kind": kind, "published": False}
    return {
        "kind": kind,
        "published": True,
        "sha256": entry.sha256,
        "date": entry.date,
        "round": entry.round,
        "validation_dice": entry.validation_dice,
    }
