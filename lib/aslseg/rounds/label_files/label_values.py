"""The value that each label has in label files, which hold numbers and no names."""

from __future__ import annotations

from pathlib import Path

from aslseg.errors import BadSettingsError
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.settings import Settings

LABELS = "labels"
"""Kind of the event by which a person says which values are right."""


def require_same_values(ledger: Ledger, studies: Path | None, settings: Settings) -> None:
    """Refuse labels of which one has another value than in the last round, as soon as anything is drawn.

    Args:
        ledger: Its rounds say what ``labels`` was.
        studies: The studies folder; None is a PACS, whose labels have names.
        settings: With ``labels`` as they are now.

    Raises:
        BadSettingsError: A label has moved.
    """
    if studies is None or not any(p.is_file() for p in (studies / "labels").rglob("*")):
        return
    names, before = list(settings.labels), _before(ledger)
    moved = [n for n in names if n in before and names.index(n) != before.index(n)]
    if not moved:
        return
    name, better = moved[0], [*before, *(n for n in names if n not in before)]
    raise BadSettingsError(
        f"labels: {name} has the value {before.index(name) + 1} in the label files of {studies}, and would have "
        f"{names.index(name) + 1} with labels = {','.join(names)}: all that is drawn would be read as something else. "
        f"Expected the order of before with new labels last: {','.join(better)}. Other structures need another studies "
        "folder and model_dir. If the order of before was the wrong one: aslseg ledger labels --studies DIR"
    )


def note_values(ledger: Ledger, settings: Settings) -> None:
    """Note that label files hold these values, whatever earlier rounds have taken them for."""
    ledger.append([Entry(LABELS, details={"labels": list(settings.labels)})])


def _before(ledger: Ledger) -> list[str]:
    found: list[str] = []
    for event in ledger.events(kinds=(LABELS, "opened")):
        found = event.details.get("labels") or event.details.get("settings", {}).get("labels") or found
    return list(found)
