"""How good promoted masks were, once people have saved labels of the same scans."""

from __future__ import annotations

import logging
from pathlib import Path

from aslseg.cases.studies import PSEUDO, read_studies
from aslseg.compute.overlap import dice
from aslseg.errors import AslsegError
from aslseg.files import sha256
from aslseg.rounds.ledger import Entry, Ledger
from aslseg.rounds.masks import MaskStore
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image, read_label

logger = logging.getLogger(__name__)

CHECKED = "checked"
"""Kind of event: Dice of a promoted mask and the human label that came after it."""


def record_checked(paths: Paths, settings: Settings, case: str | None = None) -> None:
    """Append the Dice of each promoted mask whose scan has a human label now, each pair of mask and label once.

    What cannot be compared is passed over with a line in the log.

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
    ledger = Ledger(paths.ledger)
    promoted = {c: e for c, e in ledger.masks(PSEUDO).items() if e.kind == "mask" and case in (None, c)}
    if not promoted:
        return
    studies = read_studies(paths.studies)
    noted = {(e.details["mask"], e.details["label"]) for e in ledger.events(kinds=(CHECKED,))}
    for name in sorted(promoted.keys() & studies.final.keys()):
        event, path = promoted[name], studies.final[name]
        pair = event.details["sha256"], sha256(path)
        if pair in noted:
            continue
        found = dice_of_kept(paths, settings, studies.images[name], path, pair[0])
        if found is None:
            continue
        details = {"dice": found, "mask": pair[0], "label": pair[1]}
        ledger.append([Entry(CHECKED, event.round, name, PSEUDO, details)])
        logger.info("promoted mask of %s: Dice with its human label %s", name, found)


def dice_of_kept(
    paths: Paths, settings: Settings, image: Path, label: Path, digest: str
) -> dict[str, float | None] | None:
    """Dice of a kept mask and a human label, by label name, on the scan's own grid.

    Args:
        paths: Where masks are kept.
        settings: ``labels``, ``nested``, ``max_voxels``.
        image, label: Files of the scan and of its human label.
        digest: SHA-256 of the mask.

    Returns:
        None where they cannot be compared; the log says why.
    """
    labels, store = settings.label_set, MaskStore(paths.home)
    try:
        scan = read_image(image, settings.max_voxels)
        human = labels.regions(read_label(label, scan, labels))
        machine = labels.regions(read_image(store.path(digest), settings.max_voxels).array.astype("uint8"))
        return {name: dice(a, b) for name, a, b in zip(labels.names, machine, human, strict=True)}
    except (AslsegError, ValueError, OSError) as error:
        logger.warning("a mask of %s was not compared with its human label: %s", label.name, error)
        return None
