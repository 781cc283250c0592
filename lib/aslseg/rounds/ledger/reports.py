"""What a round did, as a file beside the ledger, with the ledger's head at that time.

Reports tell whether the ledger has lost anything since; with the label files they are what a lost one is rebuilt from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aslseg.cases.studies import PSEUDO
from aslseg.files import write_json
from aslseg.rounds.ledger.anchor import Head
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.ledger.vetoes import mask_vetoes, model_vetoes
from aslseg.settings import Paths

PARTS = {"summary", "promoted", "validation_patients", "mask_vetoes", "model_vetoes"}
logger = logging.getLogger(__name__)


def write_report(paths: Paths, ledger: Ledger, summary: dict[str, Any]) -> dict[str, Any]:
    """Write the report of a round that is about to be closed.

    Args:
        paths: Reports go to :attr:`aslseg.settings.Paths.reports`, as ``round-N.json``.
        ledger: Its head, its present promotions, validation patients and vetoes are part of the report.
        summary: Of the round; its number is ``round``.

    Returns:
        The summary with the head as ``ledger``.
    """
    summary = summary | {"ledger": asdict(ledger.head())}
    content = {
        "summary": summary,
        "promoted": {
            case: event.details | {"round": event.round}
            for case, event in ledger.masks(PSEUDO).items()
            if event.kind == "mask"
        },
        "validation_patients": sorted(ledger.validation_patients()),
        "mask_vetoes": {case: sorted(masks) for case, masks in mask_vetoes(ledger).items()},
        "model_vetoes": sorted(model_vetoes(ledger)),
    }
    write_json(paths.reports / f"round-{summary['round']}.json", content)
    return summary


def read_reports(paths: Paths) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All reports that can be read, oldest round first."""
    numbered = [(p.stem.removeprefix("round-"), p) for p in paths.reports.glob("round-*.json")]
    for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal()):
        try:
            content = json.loads(path.read_text())
            head_of(content)
            missing = PARTS - content.keys()
            if missing:
                raise ValueError(f"{', '.join(sorted(missing))} missing")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s)", path, type(error).__name__)
            continue
        yield path, content


def head_of(report: dict[str, Any]) -> Head:
    """The ledger's head when a report was written."""
    return Head(**report["summary"]["ledger"])


def contradicting_reports(ledger: Ledger, paths: Paths) -> list[str]:
    """Reports whose head is no part of the ledger, without those that a repair has dealt with."""
    known = {name for event in ledger.events(kinds=("lost",)) for name in event.details["reports"]}
    reports = ((path, report) for path, report in read_reports(paths) if path.name not in known)
    found = ((path, ledger.contradiction(head_of(report))) for path, report in reports)
    return [f"{paths.ledger}: {why}, says {path.name}" for path, why in found if why]
