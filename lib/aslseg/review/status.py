"""The server's current work and past decisions, as one dictionary of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from aslseg.cases.studies import read_studies
from aslseg.errors import AslsegError, LedgerError
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.published import Published, find_published, left_behind
from aslseg.rounds.corrections import CHECKED
from aslseg.rounds.ledger import Ledger, RoundRow
from aslseg.rounds.nights import Nights
from aslseg.rounds.progress import read_progress
from aslseg.rounds.schedule import finish_text, utc_now, zone_of
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
        rounds, loss, night = ledger.rounds(), ledger.loss(), _night(ledger, settings)
        checked = {e.details["mask"]: e.details["dice"] for e in ledger.events(kinds=(CHECKED,))}
    except LedgerError as error:
        scores, promotions, rounds, loss, night, checked = [], [], [], str(error), {}, {}
    if loss:
        failures.append({"model": "ledger", "time": None, "lines": [loss]})
    last: dict[str, Any] = next((r.summary for r in reversed(rounds) if r.summary), {})
    return {
        "labels": list(settings.label_set.names),
        "progress": progress | {"finish_text": finish_text(progress, settings)},
        "night": night,
        "not_promoted": _reasons(rounds),
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
            | {"checked": checked.get(p.sha256)}
            for p in reversed(promotions)
        ][:MOST],
        "errors": failures[-MOST:],
    }


def _named(skipped: tuple[str, str]) -> str:
    """Why a round left a scan out, with its name."""
    case, reason = skipped
    return reason if reason.startswith((f"{case}:", f"{case}.")) else f"{case}: {reason}"


def _night(ledger: Ledger, settings: Settings) -> dict[str, str]:
    """The schedule in words: ``next``, ``held``, ``last``; empty where there is nothing to say."""
    state = Nights(ledger, settings).state(utc_now())
    stop, last, zone = state["held"], state["last"], zone_of(settings)

    def shown(time: str) -> str:
        return datetime.fromisoformat(time).astimezone(zone).strftime("%a %d %b %H:%M")

    coming = f"The night is open until {shown(state['open'])}." if state["open"] else ""
    if state["next"] and not coming:
        coming = f"The next round starts by itself on {shown(state['next'])}."
    if state["after_labels"]:
        coming = f"{coming} A round starts after {state['after_labels']} new labels.".strip()
    return {
        "next": coming,
        "held": f"Stopped by {stop['by']} on {shown(stop['at'])}: nothing starts before Train or the next night."
        if stop
        else "",
        "last": f"Night of {shown(last['opens'])}: {last['outcome']}." if last else "",
    }


def _reasons(rounds: Sequence[RoundRow]) -> dict[str, str]:
    """Why scans were not promoted in the last round that ended, by case id."""
    done = [r.summary.get("not promoted", {}) for r in rounds if r.state == "done"]
    return {case: "; ".join(reasons) for case, reasons in (list(done[-1].items())[:MOST] if done else ())}


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
