"""What machine masks save the people who open scans: how many are accepted unchanged, how much is changed, how long.

A saved label is compared with the mask that clients showed for its scan (tag ``original``). Saving stays as quick as it
is: the event ``saved`` holds all that is needed, and masks are compared when the next round starts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime
from statistics import mean, median
from typing import Any

import numpy as np

from aslseg.cases.studies import FINAL, ORIGINAL, Studies, read_studies
from aslseg.compute.overlap import dice
from aslseg.errors import AslsegError
from aslseg.files import sha256
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.ledger import Entry, Event, Ledger
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image, read_label

logger = logging.getLogger(__name__)

COMPARED = "compared"
"""Kind of event: the mask that was shown for a scan, and the label that a person saved for it."""
NEARLY = 0.99
"""Dice of each label from which a mask counts as accepted nearly unchanged."""
LONGEST = 120.0
"""Minutes between *Next Sample* and saving beyond which nobody knows how long somebody worked."""


def record_compared(paths: Paths, settings: Settings) -> None:
    """Append the comparison of each saved label with the mask that was shown for its scan, each pair once.

    What cannot be compared is passed over with a line in the log. The last label of a scan counts.

    Args:
        paths: The studies folder.
        settings: ``labels``, ``nested``, ``max_voxels``.

    Raises:
        LedgerError: The ledger cannot be read or written.
        NotEnoughCasesError: The studies folder holds no scan.
    """
    if paths.studies is None:
        return
    ledger = Ledger(paths.ledger)
    noted = {(e.details["mask"], e.details["label"]) for e in ledger.events(kinds=(COMPARED,))}
    new = [(s, m) for s, m in _shown(ledger) if (m.details["sha256"], s.details["sha256"]) not in noted]
    if not new:
        return
    studies, store = read_studies(paths.studies), MaskStore(paths.home)
    for saved, shown in new:
        try:
            found = _compare(studies, store, saved, shown, settings)
        except (AslsegError, ValueError, OSError) as error:
            logger.warning("the mask that was shown for %s was not compared with its label: %s", saved.case, error)
            continue
        if found:
            about = {"mask": shown.details["sha256"], "label": saved.details["sha256"], "minutes": _minutes(saved)}
            source = {"source": shown.details.get("source"), "promoted": bool(shown.details.get("promoted"))}
            ledger.append([Entry(COMPARED, shown.round, saved.case, ORIGINAL, found | about | source)])


def savings(ledger: Ledger) -> dict[str, Any] | None:
    """What machine masks have saved so far; None before anything was compared.

    Returns:
        ``scans`` (saved with a mask shown), ``unchanged`` (voxel for voxel), ``nearly`` (changed, but every label has
        a Dice of at least :data:`NEARLY`), ``dice`` (mean by label of mask and label; None where neither has held it),
        ``minutes`` (median from *Next Sample* to saving; None without any), ``timed`` and ``too_long`` (scans that
        these minutes are of, and that took longer than :data:`LONGEST`).
    """
    last = {(e.case, e.details["mask"]): e.details for e in ledger.events(kinds=(COMPARED,))}.values()
    if not last:
        return None
    changed = [d for d in last if not d["unchanged"]]
    known = [d["minutes"] for d in last if d["minutes"] is not None]
    timed = [m for m in known if m <= LONGEST]
    names = sorted({name for d in last for name in d["dice"]})
    values = {n: [d["dice"][n] for d in last if d["dice"].get(n) is not None] for n in names}
    return {
        "scans": len(last),
        "unchanged": len(last) - len(changed),
        "nearly": sum(all(v is None or v >= NEARLY for v in d["dice"].values()) for d in changed),
        "dice": {name: mean(v) if v else None for name, v in values.items()},
        "minutes": median(timed) if timed else None,
        "timed": len(timed),
        "too_long": len(known) - len(timed),
    }


def in_words(found: dict[str, Any] | None) -> list[str]:
    """Sentences of what :func:`savings` found, for pages and reports."""
    if found is None:
        return ["Nobody has saved a label yet for a scan that had a machine mask."]
    n, dices = found["scans"], {name: value for name, value in found["dice"].items() if value is not None}
    lines = [
        f"People have saved labels of {n} {'scan' if n == 1 else 'scans'} that had a machine mask. They accepted "
        f"{found['unchanged']} of these masks ({found['unchanged'] / n:.0%}) unchanged, and {found['nearly']} nearly "
        f"so (Dice of each label at least {NEARLY:g}).",
    ]
    if dices:
        lines.append(
            "Dice of the mask that was shown and the label that was saved: "
            f"{', '.join(f'{name} {value:.3f}' for name, value in dices.items())}."
        )
    if found["timed"] or found["too_long"]:
        minutes = "unknown" if found["minutes"] is None else f"{found['minutes']:.0f} minutes"
        late = f"; {found['too_long']} took longer than {LONGEST:.0f} minutes and are not counted"
        lines.append(
            f"From Next Sample to saving: {minutes} (median of {found['timed']} "
            f"{'scan' if found['timed'] == 1 else 'scans'}{late if found['too_long'] else ''})."
        )
    return lines


def _shown(ledger: Ledger) -> Iterator[tuple[Event, Event]]:
    """The last human label of each scan that was saved through the server, and the mask that was shown before it.

    That is the mask of when the scan was handed out, where this is known: a round may have drawn another one since.
    """
    masks: dict[str, list[Event]] = {}
    for event in ledger.events(kinds=("mask", "removed"), tag=ORIGINAL):
        masks.setdefault(event.case or "", []).append(event)
    for saved in {e.case: e for e in ledger.events(kinds=("saved",), tag=FINAL)}.values():
        before = [m for m in masks.get(saved.case or "", ()) if m.seq < saved.seq]
        opened = saved.details.get("handed_out")
        seen = [m for m in before if opened is None or datetime.fromisoformat(m.time).timestamp() <= opened]
        shown = (seen or before)[-1:]
        if shown and shown[0].kind == "mask":  # a rollback takes masks away
            yield saved, shown[0]


def _compare(
    studies: Studies, store: MaskStore, saved: Event, shown: Event, settings: Settings
) -> dict[str, Any] | None:
    """``dice`` by label and ``unchanged``; None where the label or its scan is gone or is another file by now."""
    case, labels = saved.case or "", settings.label_set
    path, image = studies.final.get(case), studies.images.get(case)
    if path is None or image is None or sha256(path) != saved.details["sha256"]:
        return None
    scan = read_image(image, settings.max_voxels)
    human = read_label(path, scan, labels, settings.max_voxels)
    machine = read_image(store.path(shown.details["sha256"]), settings.max_voxels).array.astype(np.uint8)
    pairs = zip(labels.names, labels.regions(machine), labels.regions(human), strict=True)
    return {"dice": {name: dice(a, b) for name, a, b in pairs}, "unchanged": bool(np.array_equal(machine, human))}


def _minutes(saved: Event) -> float | None:
    """Minutes from when the scan was handed out to when its label was saved; None where that is not known."""
    opened, ended = saved.details.get("handed_out"), saved.details.get("info", {}).get("ts")
    # the clock may have been moved back between the two
    return (ended - opened) / 60 if opened is not None and ended is not None and ended >= opened else None
