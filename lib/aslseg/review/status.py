"""The server's current work and past decisions, as one dictionary of plain values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from aslseg.cases.studies import FINAL, Scans, read_scans, read_studies
from aslseg.errors import AslsegError, LedgerError
from aslseg.files import FileStamp
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.published import Published, find_published, left_behind
from aslseg.review.ledger_lists import MOST, Decisions, decisions
from aslseg.rounds.gate.fresh import mean_over_labels, stated
from aslseg.rounds.ledger.ledger import Ledger, Promotion, RoundRow
from aslseg.rounds.scheduling.nights import Nights
from aslseg.rounds.scheduling.progress import read_progress
from aslseg.rounds.scheduling.schedule import finish_text, utc_now, zone_of
from aslseg.settings import Paths, Settings

TICK_SECONDS = 0.1


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
        decided, loss, night = decisions(ledger), ledger.loss(), _night(ledger, settings)
    except LedgerError as error:
        decided, loss, night = Decisions(), str(error), {}
    if loss:
        failures.append({"model": "ledger", "time": None, "lines": [loss]})
    return {
        "labels": list(settings.label_set.names),
        "progress": progress | {"finish_text": finish_text(progress, settings)},
        "night": night,
        "not_promoted": decided.not_promoted,
        "flagged": list(decided.flagged),
        "models": [_model(kind, find_published(paths, kind), decided.fresh) for kind in PUBLISHED_KINDS],
        "stated": stated(decided.fresh),
        "cases": store,
        "problems": [*_problems(paths, decided.served), *notes],
        "promise": list(decided.promise),
        "audits": decided.audits,
        "warnings": list(decided.warnings),
        "rounds": [_round(r) for r in reversed(decided.rounds)][:MOST],
        "ranking": [
            {"rank": n + 1, "case": s.case, "agreement": round(s.agreement, 4), "details": s.details}
            for n, s in enumerate(decided.scores)
        ],
        "promotions": [_promotion(p, decided.checked) for p in decided.promotions],
        "savings": [] if loss else list(decided.savings),
        "errors": failures[-MOST:],
    }


def _round(row: RoundRow) -> dict[str, Any]:
    about = {"round": row.number, "state": row.state, "opened": row.opened, "closed": row.closed, "error": row.error}
    return about | {"out_of_fold": row.summary.get("out_of_fold", {}).get("dice", {})}


def _promotion(p: Promotion, checked: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    """A promoted mask, with its Dice with the human label that came after it."""
    about = {"case": p.case, "round": p.round, "time": p.time, "agreement": p.agreement, "status": p.status}
    return about | {"threshold": p.threshold, "checked": checked.get(p.sha256)}


def _night(ledger: Ledger, settings: Settings) -> dict[str, str]:
    """The schedule in words: ``next``, ``held``, ``last``; empty where there is nothing to say."""
    state = Nights(ledger, settings).state(utc_now())
    stop, last, zone = state["held"], state["last"], zone_of(settings)

    def shown(time: str) -> str:
        return datetime.fromisoformat(time).astimezone(zone).strftime("%a %d %b %H:%M")

    coming = f"The night is open until {shown(state['open'])}." if state["open"] else ""
    if state["next"] and not coming:
        coming = f"The next round starts by itself on {shown(state['next'])}."
    if count := state["after_labels"]:
        coming = f"{coming} A round starts after {count} new label{'' if count == 1 else 's'}.".strip()
    return {
        "next": coming,
        "held": f"Stopped by {stop['by']} on {shown(stop['at'])}: nothing starts before Train or the next night."
        if stop
        else "",
        "last": f"By the schedule on {shown(last['opens'])}: {last['outcome']}." if last else "",
    }


def _problems(paths: Paths, served: dict[str, Any] | None) -> list[str]:
    """What the studies folder holds that is passed over, or why it cannot be listed; and models that lie elsewhere."""
    if paths.studies is None:
        return []
    files = (paths.studies, paths.studies / "labels" / FINAL, paths.studies / "patients.csv")
    stamps = tuple(FileStamp.of(file) for file in files)
    read = _read_problems if all(map(_settled, stamps)) else _read_problems.__wrapped__
    found = []
    try:
        found += [left_behind(paths, served)] if served is not None else []
        found += read(paths.studies, stamps)
    except AslsegError as error:
        found.append(str(error))
    return [problem for problem in found if problem]


def _settled(stamp: FileStamp | None) -> bool:
    """Whether the next change will leave another stamp; one within the clock tick of the file system does not."""
    return stamp is None or abs(time.time() - stamp.mtime_ns / 1e9) > TICK_SECONDS


@lru_cache(maxsize=8)
def _read_problems(root: Path, stamps: tuple[FileStamp | None, ...]) -> tuple[str, ...]:
    # after a label was saved, the scans, of which there may be thousands, are those that were listed before
    read = _read_scans if _settled(stamps[0]) else _read_scans.__wrapped__
    return read_studies(root, read(root, stamps[0])).problems


@lru_cache(maxsize=8)
def _read_scans(root: Path, _: FileStamp | None) -> Scans:
    return read_scans(root)


def _model(kind: ModelKind, entry: Published | None, fresh: dict[str, Any]) -> dict[str, Any]:
    if entry is None:
        return {"kind": kind, "published": False}
    dice, scans = mean_over_labels(fresh.get(kind.value, {}))
    return {
        "kind": kind,
        "published": True,
        "sha256": entry.sha256,
        "date": entry.date,
        "round": entry.round,
        "fresh_dice": dice,
        "fresh_scans": scans,
        "validation_dice": entry.validation_dice,
    }
