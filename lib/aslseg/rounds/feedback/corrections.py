"""How good promoted masks were, once people have saved labels of the same scans."""

from __future__ import annotations

import logging
from pathlib import Path

from aslseg.cases.studies import PSEUDO, read_studies
from aslseg.compute.overlap import dice
from aslseg.errors import AslsegError
from aslseg.files import sha256
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.audits import CHECKED, GONE, audits
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image, read_label

logger = logging.getLogger(__name__)


def record_checked(paths: Paths, settings: Settings, case: str | None = None) -> None:
    """Append the Dice of each promoted or audited mask whose scan has a human label now, each pair of both once.

    What cannot be compared is passed over with a line in the log. An audited mask is compared as long as it is kept,
    also where it is not promoted any more.

    Args:
        paths: The studies folder.
        settings: ``labels``, ``nested``, ``max_voxels``.
        case: Only this scan.

    Raises:
        LedgerError: The ledger cannot be read or written.
        NotEnoughCasesError: The studies folder holds no scan.
    """
    if paths.studies is None:
        return
    ledger, store = Ledger(paths.ledger), MaskStore(paths.home)
    drawn = {(a.case, a.mask): a for a in audits(ledger) if store.path(a.mask).exists()}
    rounds = {key: audit.round for key, audit in drawn.items()}
    masks = ledger.masks(PSEUDO, cases=None if case is None else [case])
    rounds |= {(c, e.details["sha256"]): e.round or 0 for c, e in masks.items() if e.kind == "mask"}
    rounds = {key: number for key, number in rounds.items() if case in (None, key[0])}
    if not rounds:
        return
    studies, noted = read_studies(paths.studies), _noted(ledger)
    for name, digest in sorted(key for key in rounds if key[0] in studies.final):
        pair = {"mask": digest, "label": sha256(studies.final[name])}
        if (name, *pair.values()) in noted:
            continue
        audit = drawn.get((name, digest))
        if audit and sha256(studies.images[name]) != audit.image:
            about = {"why": GONE, "image": audit.image}
            ledger.append([Entry("note", rounds[name, digest], name, PSEUDO, pair | about)])
            continue
        try:
            found = dice_of_kept(studies.images[name], studies.final[name], store.path(digest), settings)
        except (AslsegError, ValueError, OSError) as error:
            logger.warning("the promoted mask of %s was not compared with its human label: %s", name, error)
            continue
        ledger.append([Entry(CHECKED, rounds[name, digest], name, PSEUDO, pair | {"dice": found})])
        logger.info("promoted mask of %s: Dice with its human label %s", name, found)


def _noted(ledger: Ledger) -> set[tuple[str | None, str, str]]:
    """Scan, mask and label of what needs no comparison any more."""
    events = ledger.events(kinds=(CHECKED, "note"))
    return {(e.case, e.details["mask"], e.details["label"]) for e in events if {"mask", "label"} <= e.details.keys()}


def dice_of_kept(image: Path, label: Path, mask: Path, settings: Settings) -> dict[str, float | None]:
    """Dice of a machine mask and a human label, by label name, on the scan's own grid.

    Args:
        image, label, mask: Files.
        settings: ``labels``, ``nested``, ``max_voxels``.

    Raises:
        AslsegError, ValueError, OSError: They cannot be read, or do not belong together.
    """
    labels = settings.label_set
    scan = read_image(image, settings.max_voxels)
    human = labels.regions(read_label(label, scan, labels))
    machine = labels.regions(read_image(mask, settings.max_voxels).array.astype("uint8"))
    return {name: dice(a, b) for name, a, b in zip(labels.names, machine, human, strict=True)}
