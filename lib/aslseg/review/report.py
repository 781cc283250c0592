"""What a round did, as one HTML file that needs nothing else: for the morning after.

It is written when a round ends, beside the ledger, and can be written again from the ledger at any time.
"""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.studies import PSEUDO, Studies, read_studies
from aslseg.errors import AslsegError, LedgerError
from aslseg.files import atomic_file, sha256
from aslseg.review.ledger_lists import MOST, named
from aslseg.review.page import template
from aslseg.review.pictures import COLOURS, outlined
from aslseg.review.webhook import send
from aslseg.rounds.feedback import savings
from aslseg.rounds.gate.fresh import stated
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.audits import CHECKED, audits, kept_since, promise_lines, waiting
from aslseg.rounds.ledger.ledger import Event, Ledger, RoundRow
from aslseg.rounds.promotion import canaries
from aslseg.rounds.promotion.decisions import Decision, count_reasons, decisions_of
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image

logger = logging.getLogger(__name__)

DOUBTFUL, AT_RANDOM = 5, 3
"""Promoted masks of which a report has pictures: those with the lowest agreement, and others."""
FIRST = 10
"""Scans that a person should look at first."""
TRUST = (
    (0.85, "Mostly right. Expect small corrections, and look at every slice."),
    (0.7, "A start. Expect to correct most scans."),
    (0.5, "A hint of where to look. Expect to redraw much of it."),
    (0.0, "Not usable. Draw it by hand until there are more labels."),
)
"""Least Dice, and what a mask of such a class is good for."""
FEW_CASES = 5
"""Scored cases below which a mean is called uncertain."""


def write(
    paths: Paths, settings: Settings, number: int | None = None, out: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write the report of a round from the ledger.

    Args:
        paths: The studies folder.
        settings: Labels, and the window of intensities.
        number: The round; None is the last one that has ended.
        out: The file; None is the one beside the ledger.

    Returns:
        The file and what stands in it.

    Raises:
        LedgerError: There is no such round, or it has not ended.
        DiskFullError, FileWriteError: The file is as it was before.
    """
    return write_page(paths, settings, _ended(Ledger(paths.ledger), number), out)


def write_page(paths: Paths, settings: Settings, row: RoundRow, out: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Write the report of a round that has ended, or is about to be closed; otherwise as :func:`write`."""
    events = _promotions(Ledger(paths.ledger), row)
    content = collect(paths, settings, row) | {"pictures": list(_pictures(paths, settings, events, row.number))}
    out = out or report_path(paths, row.number)
    with atomic_file(out) as temporary:
        temporary.write_text(template("report.html").render(**content), encoding="utf-8", errors="replace")
    return out, content


def send_headline(paths: Paths, settings: Settings, row: RoundRow) -> None:
    """Send the headline of a round that has ended, if the settings have an address for it."""
    if settings.report_webhook:
        send(settings.report_webhook, headline(collect(paths, settings, row)))


def send_failure(settings: Settings, night: str, error: Exception) -> None:
    """Send that the round of a night failed, if the settings have an address for it.

    The message of the error may name scans, and names of scans may be names of patients: only its kind is sent.

    Args:
        settings: ``report_webhook``.
        night: When the night opened, in UTC.
        error: What ended the round.
    """
    if settings.report_webhook:
        kind = type(error).__name__
        text = f"The round of the night of {night} failed ({kind}). The page says why; the next night tries again."
        send(settings.report_webhook, {"text": text, "state": "failed", "night": night, "error": kind})


def report_path(paths: Paths, number: int) -> Path:
    """The report of a round, beside the ledger."""
    return paths.reports / f"round-{number}.html"


def collect(paths: Paths, settings: Settings, row: RoundRow) -> dict[str, Any]:
    """Everything that stands in the report of a round, as plain values, without the pictures.

    Args:
        paths: The studies folder.
        settings: Labels.
        row: The round.
    """
    ledger = Ledger(paths.ledger)
    summary, decisions = row.summary, decisions_of(row, ledger.scores())
    events, seconds = _promotions(ledger, row), summary.get("seconds", {})
    left, known = [d for d in decisions if not d.promoted], {d.case: d for d in decisions}
    return {
        "round": row.number,
        "state": row.state,
        "opened": row.opened,
        "closed": row.closed,
        "written": datetime.now(UTC).isoformat("T", "seconds"),
        "labels": _colours(settings),
        "warnings": summary.get("warnings", []),
        "first": [_shown(d) for d in left[:FIRST]],
        "promoted": [_shown_promotion(e, known.get(e.case or "")) for e in events[:MOST]],
        "promoted_total": len(events),
        "source": source_words(summary),
        "shown": summary.get("shown"),
        "reasons": [{"reason": kind, "scans": count} for kind, count in count_reasons(decisions)][:MOST],
        "left": [_shown(d) for d in left[:MOST]],
        "left_total": len(left),
        "skipped": [*map(named, summary.get("skipped", {}).items())][:MOST],
        "skipped_total": len(summary.get("skipped", {})),
        "published": summary.get("published", []),
        "validation": summary.get("validation", {}),
        "classes": _classes(settings, summary),
        "evidence": _evidence(settings, summary),
        "checked": _checked(ledger),
        "promise": promise_lines(summary.get("promise", {}), kept_since(ledger, ledger.rounds())),
        "audits": _audits(ledger, row.number),
        "canaries": canaries.in_words(summary.get("canaries", {})),
        "drift": summary.get("drift", {}),
        "savings": savings.in_words(savings.savings(ledger)),
        "seconds": dict(sorted(seconds.items(), key=lambda pair: -pair[1])),
        "computed": set(summary.get("measured", seconds)),
    }


def headline(content: dict[str, Any]) -> dict[str, Any]:
    """A report in a few plain values. It names no scan, because names of scans may be names of patients."""
    asked = content["promoted_total"] + content["left_total"]
    undone = " (rolled back since)" if content["state"] == "rolled back" else ""
    text = f"Round {content['round']}{undone}: {content['promoted_total']} of {asked} scans without a human label "
    text += "promoted."
    text = " ".join([text, *(f"{line[:1].upper()}{line[1:]}." for line in content["promise"])])
    if not content["promoted_total"] and content["reasons"]:
        text += f" Most frequent reason: {content['reasons'][0]['reason']}."
    return {
        "text": " ".join([text, *(f"{line[:1].upper()}{line[1:]}." for line in content["published"])]),
        "round": content["round"],
        "state": content["state"],
        "closed": content["closed"],
        "promoted": content["promoted_total"],
        "not_promoted": content["left_total"],
        "reasons": content["reasons"],
        "promise": content["promise"],
        "audits": content["audits"]["waiting"],
        "published": content["published"],
        "classes": {c["name"]: c["dice"] for c in content["classes"]},
        "scans": {c["name"]: c["cases"] for c in content["classes"]},
        "warnings": len(content["warnings"]),
        "seconds": round(sum(content["seconds"].values()), 1),
    }


def _ended(ledger: Ledger, number: int | None) -> RoundRow:
    rows = {r.number: r for r in ledger.rounds()}
    ended = [n for n, r in rows.items() if r.closed]
    if number is None and ended:
        return rows[ended[-1]]
    if number in ended:
        return rows[number]
    if number in rows:
        raise LedgerError(f"round {number} has not ended; its report comes with its end")
    known = ", ".join(map(str, ended)) or "none yet"
    wanted = "no round has ended" if number is None else f"there is no round {number}"
    raise LedgerError(f"{wanted} in {ledger.path}; rounds with a report: {known}")


def _promotions(ledger: Ledger, row: RoundRow) -> list[Event]:
    """The masks that a round promoted and kept to its end, lowest agreement first."""
    kept = set(row.summary.get("promoted", ()))
    events = ledger.events(kinds=("mask",), tag=PSEUDO, number=row.number)
    last = {e.case or "": e for e in events if e.details.get("restored") is None and e.case in kept}
    return sorted(last.values(), key=lambda e: (_mean(e.details["agreement"]), e.case))


def _mean(agreement: dict[str, float | None]) -> float:
    known = [v for v in agreement.values() if v is not None]
    return sum(known) / len(known) if known else 1.0


def _shown(decision: Decision) -> dict[str, Any]:
    d = decision
    return {"case": d.case, "agreement": d.agreement, "per_label": d.per_label, "reasons": d.reasons, "flags": d.flags}


def source_words(summary: dict[str, Any]) -> str | None:
    """Whose masks were promoted; by label where these differ."""
    sources = summary.get("sources", {})
    if len({*sources.values()}) < 2:
        return summary.get("source")
    return ", ".join(f"{label}: {source}" for label, source in sources.items())


def _shown_promotion(event: Event, decision: Decision | None) -> dict[str, Any]:
    about = {name: event.details[name] for name in ("agreement", "threshold")}
    reasons, flags = (decision.reasons, decision.flags) if decision else ((), ())
    return {"case": event.case, "reasons": reasons, "flags": flags, **about}


def _colours(settings: Settings) -> list[dict[str, str]]:
    return [{"name": n, "colour": COLOURS[i % len(COLOURS)]} for i, n in enumerate(settings.label_set.names)]


def _classes(settings: Settings, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Each class with its measured Dice and what it can be trusted with."""
    found, new = [], stated(summary.get("fresh", {}))
    for name in settings.label_set.names:
        about = summary.get("classes", {}).get(name, {"dice": None, "cases": 0})
        validation, fresh = about["dice"], new.get(name)
        dice, cases = (fresh["dice"], int(fresh["scans"])) if fresh else (validation, about["cases"])
        if dice is None:
            words = "Not measured: neither a new label nor a validation case holds it. Trust nothing until one does."
        else:
            words = next(text for least, text in TRUST if dice >= least)
            if cases < FEW_CASES:
                words += f" Uncertain: measured on {cases} {'scan' if cases == 1 else 'scans'}."
            if not fresh:
                words += " On validation scans, which have chosen the model: rather too high."
        found.append({"name": name, "dice": dice, "cases": cases, "validation": validation, "words": words})
    return found


def _audits(ledger: Ledger, number: int) -> dict[str, Any]:
    """The scans that were drawn after a round, and how many audits wait or were answered, of all rounds."""
    every, wait = audits(ledger), waiting(ledger)
    return {
        "drawn": [a.case for a in every if a.round == number],
        "cases": [a.case for a in wait[:FIRST]],
        "waiting": len(wait),
        "answered": sum(a.dice is not None for a in every),
    }


def _evidence(settings: Settings, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Each class with its Dice on human labels that were not trained on, and whether that allows a promotion."""
    about = summary.get("evidence", {})
    return [{"name": name, **about[name]} for name in settings.label_set.names if name in about]


def _checked(ledger: Ledger) -> dict[str, Any] | None:
    """How people found promoted masks: what the ledger has of masks whose scans they labelled later."""
    every = audits(ledger)
    close = {(a.case, a.mask) for a in every if not a.promoted} - {(a.case, a.mask) for a in every if a.promoted}
    # the last label of a mask counts
    checked = {(e.case, e.details["mask"]): e.details["dice"] for e in ledger.events(kinds=(CHECKED,))}
    scores = [dice for key, dice in checked.items() if key not in close]
    if not scores:
        return None
    known = [[v for v in dice.values() if v is not None] for dice in scores]
    unchanged = sum(all(v == 1 for v in values) for values in known)
    names = sorted({name for dice in scores for name in dice})
    by_name = {n: [d[n] for d in scores if d.get(n) is not None] for n in names}
    return {
        "masks": len(scores),
        "unchanged": unchanged,
        "dice": {name: sum(v) / len(v) if v else None for name, v in by_name.items()},
    }


def _pictures(paths: Paths, settings: Settings, events: Sequence[Event], number: int) -> Iterator[dict[str, Any]]:
    """The most doubtful promoted masks, then some of the others, drawn by a generator with the round as its seed."""
    if not events or paths.studies is None:
        return
    try:
        studies = read_studies(paths.studies)
    except AslsegError as error:
        logger.warning("no pictures in the report of round %d: %s", number, error)
        return
    rest = events[DOUBTFUL:]
    others = random.Random(number).sample(rest, min(AT_RANDOM, len(rest)))
    for kind, chosen in (("doubtful", events[:DOUBTFUL]), ("at random", others)):
        for event in chosen:
            about = {"case": event.case, "kind": kind, "agreement": event.details["agreement"]}
            try:
                yield about | _picture(paths, settings, studies, event)
            except (AslsegError, ValueError, OSError) as error:
                logger.warning("no picture of %s in the report of round %d: %s", event.case, number, error)
                yield about | {"png": None, "note": "no picture: its scan or its mask cannot be read any more"}


def _picture(paths: Paths, settings: Settings, studies: Studies, event: Event) -> dict[str, Any]:
    details, image = event.details, studies.images.get(event.case or "")
    if image is None:
        return {"png": None, "note": "no picture: the scan was taken away since"}
    if sha256(image) != details["image"]:
        return {"png": None, "note": "no picture: the scan was replaced since"}
    scan = read_image(image, settings.max_voxels)
    mask = read_image(MaskStore(paths.home).path(details["sha256"]), settings.max_voxels).array.astype(np.uint8)
    agreement = {name: value for name, value in details["agreement"].items() if value is not None}
    doubtful = min(agreement, key=lambda name: agreement[name]) if agreement else None
    found = outlined(scan, mask, settings, doubtful)
    if found is None:
        return {"png": None, "note": "no picture: the mask is empty"}
    encoded = base64.b64encode(found.png).decode()
    return {"png": encoded, "note": f"slice {found.slice} of {found.slices}"}
