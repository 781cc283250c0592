"""``aslseg ledger verify --repair``: mend what kills, full disks and restored backups leave, and say each thing.

Label files of people are never written, moved or removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from aslseg.cases.studies import ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.errors import LedgerError
from aslseg.files import temporary_files
from aslseg.rounds.label_files.masks import MaskStore, human_labels, sync_label
from aslseg.rounds.label_files.rebuild import rebuild
from aslseg.rounds.ledger.anchor import read_head
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.ledger.reports import contradicting_reports, read_reports
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.settings import Paths

LOCK_SECONDS = 10.0
STALE_SECONDS = 3600.0


def repair(paths: Paths) -> list[str]:
    """Mend the ledger's head, a ledger that lost events, temporary files, and the label files of rounds.

    Returns:
        A line for each thing that was mended or could not be.

    Raises:
        LedgerError: An event was changed, which only a backup mends; there is no studies folder.
        RoundRunningError: A round is running.
    """
    if paths.studies is None:
        raise LedgerError("--repair needs the studies folder; give --studies DIR")
    ledger, studies = Ledger(paths.ledger), read_studies(paths.studies)
    with round_lock(paths.home):
        broken = ledger.broken_chain()
        if broken:
            raise LedgerError(
                f"{ledger.path}: {broken}, which cannot be repaired. Restore it from a backup; or move it and "
                f"{ledger.anchor.name} away and repair again, to go on with what labels and reports say"
            )
        return [
            *_repair_ledger(ledger, studies, paths),
            *_remove_temporaries(studies.root, paths),
            *_repair_label_files(ledger, studies, paths),
        ]


def _repair_ledger(ledger: Ledger, studies: Studies, paths: Paths) -> list[str]:
    head, known = ledger.head(), read_head(ledger.anchor)
    problem = ledger.loss() or next(iter(contradicting_reports(ledger, paths)), None)
    if problem is None and not head.events and any(True for _ in (*read_reports(paths), *_machine_labels(studies))):
        problem = "there is no ledger, but there are reports or label files of rounds"
    if problem:
        return rebuild(ledger, studies, paths, problem)
    lines = []
    if head.events and known is None:
        lines.append(f"{ledger.anchor.name} was missing or damaged; it was written anew")
    elif known is not None and known != head:
        lines.append(f"{ledger.anchor.name} was {head.events - known.events} events behind; it was brought up to date")
    if lines:
        ledger.accept_head()
    if ledger.changed_scores():
        ledger.set_scores([])
        lines.append("the agreements had been changed and were deleted; `aslseg rank` measures them again")
    return lines


def _machine_labels(studies: Studies) -> Iterator[Path]:
    for tag in (PSEUDO, ORIGINAL):
        yield from (studies.root / "labels" / tag).glob("[!.]*")


def _remove_temporaries(root: Path, paths: Paths) -> list[str]:
    """Delete what killed processes were writing; where a server writes, only under its lock, or what is old."""
    folders = (paths.rounds, paths.home / "masks", paths.home / "original", paths.reports, paths.models)
    found = [*temporary_files(paths.home, deep=False), *temporary_files(*folders)]
    kept = (paths.home / name for name in ("parked", "versions", "trash", "cache"))
    found += temporary_files(*kept, seconds=STALE_SECONDS)
    lines = []
    try:
        with FileLock(root / ".lock", timeout=LOCK_SECONDS):
            found += temporary_files(root, *root.glob("labels/*"), deep=False)
            for path in found:
                path.unlink(missing_ok=True)
    except Timeout:
        lines.append(f"{root}: temporary files were left, as a server is writing; repair again later")
    if found and not lines:
        lines.append(f"{len(found)} temporary files of processes that were killed were deleted")
    return lines


def _repair_label_files(ledger: Ledger, studies: Studies, paths: Paths) -> list[str]:
    store, human, lines = MaskStore(paths.home), human_labels(studies.root), []
    for tag in (PSEUDO, ORIGINAL):
        for case, event in sorted(ledger.masks(tag).items()):
            if event.kind == "mask" and (case not in studies.images or case in human):
                continue
            try:
                if sync_label(studies, paths, tag, case, event, store):
                    lines.append(f"labels/{tag}/{case}: as the ledger says again")
            except LedgerError as error:
                lines.append(f"labels/{tag}/{case} cannot be written again: {error}")
    return lines
