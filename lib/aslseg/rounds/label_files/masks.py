"""The machine's label files: the ledger says which mask belongs where, and the files are brought in line.

Every mask that a round made is kept once, by its hash, under ``home/masks``. A change is first appended to the ledger
and then carried out by :func:`sync_label_files`, which can be run again after a kill. ``final`` is never touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.errors import LedgerError
from aslseg.files import atomic_file, sha256, write_json
from aslseg.rounds.label_files.label_info import label_info_problems
from aslseg.rounds.ledger.audits import waiting
from aslseg.rounds.ledger.ledger import Entry, Event, Ledger
from aslseg.rounds.ledger.reports import contradicting_reports
from aslseg.rounds.ledger.vetoes import mask_vetoes
from aslseg.settings import Paths
from aslseg.volume.io import case_id, extension, write_label

KEEP_ROUNDS = 5
HUMAN_WINS = "a human label was saved meanwhile; it wins"


class MaskStore:
    """Masks by their hash.

    Args:
        home: :attr:`aslseg.settings.Paths.home`.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home / "masks"

    def add(self, class_map: np.ndarray, affine: np.ndarray) -> str:
        """Keep a mask (i, j, k) on its scan's grid; returns its file's SHA-256."""
        new = self.folder / "new.nii.gz"
        write_label(new, class_map, affine)
        return self._name(new)

    def import_file(self, path: Path) -> str:
        """Keep a copy of a label file that no round made; returns its SHA-256."""
        new = self.folder / "new.nii.gz"
        with atomic_file(new) as temporary:
            shutil.copyfile(path, temporary)
        return self._name(new)

    def path(self, digest: str) -> Path:
        """Where a mask is kept."""
        return self.folder / f"{digest}.nii.gz"

    def restore(self, digest: str, target: Path) -> None:
        """Copy a mask to its place, atomically.

        Raises:
            LedgerError: It is no longer kept.
        """
        if not self.path(digest).exists():
            raise LedgerError(f"{target.name}: the mask {digest[:12]} is no longer kept (after {KEEP_ROUNDS} rounds)")
        with atomic_file(target) as temporary:
            shutil.copyfile(self.path(digest), temporary)

    def prune(self, ledger: Ledger) -> None:
        """Delete masks that neither the current state nor a rollback of one of the last rounds needs."""
        first = first_kept_event(ledger)
        needed: set[str] = set()
        for tag in (ORIGINAL, PSEUDO):
            for event in (*ledger.masks(tag).values(), *ledger.masks(tag, before=first).values()):
                needed |= _hashes(event.details)
            for event in ledger.events(kinds=("mask",), tag=tag):
                needed |= _hashes(event.details) if event.seq >= first else set()
        needed |= {audit.mask for audit in waiting(ledger)}
        # new masks are compared with those that were taken back
        needed |= set().union(*mask_vetoes(ledger).values())
        for path in self.folder.glob("*.nii.gz") if first else ():
            if case_id(path) not in needed:
                path.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        digest = sha256(path)
        if self.path(digest).exists():
            path.unlink()
        else:
            path.replace(self.path(digest))
        return digest


def first_kept_event(ledger: Ledger) -> int:
    """The event that opened the first of the rounds that can be rolled back; 0 while all can."""
    rounds = [r for r in ledger.rounds() if r.state != "rolled back"]
    return rounds[-KEEP_ROUNDS].seq if len(rounds) > KEEP_ROUNDS else 0


def _hashes(details: dict[str, Any]) -> set[str]:
    return {h for h in (details.get(k) for k in ("sha256", "disagreement", "confidence")) if h}


def plan_label_changes(
    ledger: Ledger,
    studies: Studies,
    tag: str,
    number: int,
    wanted: Mapping[str, dict[str, Any]],
    late: Mapping[str, str] | None = None,
) -> list[Entry]:
    """Events that lead from the current masks of a tag to the wanted ones.

    A mask that this round has put there already gives no event, so that a resumed round records nothing twice. A file
    that no round wrote is kept first, so that a rollback can restore it. Promotions are decided anew in each round: a
    mask that is no longer wanted is removed; an ``original`` stays until there is a newer one.

    Args:
        ledger: Read only.
        studies: Scans that have a human label by now are left alone, with a note.
        tag: ``original`` or ``aslseg_pseudo``.
        number: The round.
        wanted: Case to details with ``sha256``.
        late: Cases that may no longer be used, and why; those with a human label are found here.
    """
    now, entries = ledger.masks(tag), []
    store = MaskStore(ledger.path.parent)
    human = human_labels(studies.root)
    late = {c: HUMAN_WINS for c in wanted if c in human} | dict(late or {})
    noted = {(e.case, e.details.get("why")) for e in ledger.events(kinds=("note",), tag=tag, number=number)}
    for case, details in sorted(wanted.items()):
        if case in late:
            if (case, late[case]) not in noted:
                entries.append(Entry("note", number, case, tag, {"why": late[case]}))
            continue
        old = now.get(case)
        if old and old.kind == "mask" and old.details["sha256"] == details["sha256"] and old.round == number:
            continue
        path = studies.label_path(tag, case)
        if old is None and path.exists():
            found = {"sha256": store.import_file(path), "source": "found"}
            entries.append(Entry("mask", None, case, tag, found | {"restored": 0}))
        entries.append(Entry("mask", number, case, tag, details))
    for case, old in sorted(now.items()):
        if tag == PSEUDO and old.kind == "mask" and (case in human or case in late or case not in wanted):
            why = "a human label was saved" if case in human else late.get(case, "not promoted in this round")
            entries.append(Entry("removed", number, case, tag, {"why": why, "was": old.details["sha256"]}))
    return entries


def human_labels(root: Path) -> set[str]:
    """Cases that have a human label now."""
    folder = root / "labels" / FINAL
    return {case_id(p) for p in folder.iterdir() if extension(p)} if folder.is_dir() else set()


def unwritable_labels(studies: Studies) -> str | None:
    """Why machine masks cannot be shown: their folders cannot be written, as on a share with read-only scans."""
    folders = [studies.label_path(tag, "").parent for tag in (PSEUDO, ORIGINAL)]
    closed = [folder for folder in folders if not _writable(folder)]
    if not closed:
        return None
    return (
        f"{closed[0]} cannot be written: models are trained and published, but machine masks stay in the home folder "
        "and no client shows them. Give this user write access to it"
    )


def _writable(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def sync_label_files(ledger: Ledger, studies: Studies, paths: Paths) -> list[str]:
    """Bring the label files in line with the ledger; can be repeated at any time.

    A folder that cannot be written is passed over; a later call, once it can be, brings it in line.

    Returns:
        What was written or removed, as ``tag/case``.
    """
    store, human, changed = MaskStore(paths.home), human_labels(studies.root), []
    for tag in (PSEUDO, ORIGINAL):
        masks = ledger.masks(tag) if _writable(studies.label_path(tag, "").parent) else {}
        for case, event in sorted(masks.items()):
            if event.kind == "mask" and (case not in studies.images or case in human):
                continue
            if sync_label(studies, paths, tag, case, event, store):
                changed.append(f"{tag}/{case}")
    return changed


def sync_label(studies: Studies, paths: Paths, tag: str, case: str, event: Event, store: MaskStore) -> bool:
    """Bring one label file, and what is kept beside it, in line with the last event about it; whether it changed.

    Raises:
        LedgerError: Its mask is no longer kept.
    """
    changed = _sync_one(studies.label_path(tag, case), event, store)
    if tag == ORIGINAL:
        _sidecar(paths.home / "original" / f"{case}.json", event)
    return changed


def verify_label_files(paths: Paths) -> list[str]:
    """What is not as it was written: the ledger, its head and its scores, reports, label files; empty if all is."""
    ledger = Ledger(paths.ledger)
    broken = ledger.verify()
    problems = [f"{paths.ledger}: {broken}"] if broken else contradicting_reports(ledger, paths)
    if paths.studies is None:
        return problems
    studies, human = read_studies(paths.studies), human_labels(paths.studies)
    known = ledger.masks(PSEUDO)
    for path in sorted((paths.studies / "labels" / PSEUDO).glob("*")):
        if extension(path) and path.name[0] != "." and case_id(path) not in known:
            problems.append(f"{path}: not recorded as promoted; only rounds write here")
    problems += label_info_problems(paths.studies, ledger)
    for tag in (PSEUDO, ORIGINAL):
        for case, event in sorted(ledger.masks(tag).items()):
            path = studies.label_path(tag, case)
            if event.kind == "removed" or case in human:
                continue
            if not path.exists():
                problems.append(f"{path}: missing; the next round writes it again")
            elif sha256(path) != event.details["sha256"]:
                problems.append(f"{path}: not what round {event.round} wrote; the next round writes it again")
    return problems


def _sync_one(path: Path, event: Event, store: MaskStore) -> bool:
    digest = sha256(path) if path.exists() else None
    if event.kind == "removed":
        # a file under our tag that somebody else wrote is not deleted
        ours = digest is not None and digest == event.details.get("was")
        if ours:
            path.unlink()
        return ours
    if digest == event.details["sha256"]:
        return False
    store.restore(event.details["sha256"], path)
    return True


def _sidecar(path: Path, event: Event) -> None:
    """Write the details that the server shows beside the mask; MONAI Label's own JSON file is left to MONAI Label."""
    if event.kind == "removed" or event.details.get("source") == "found":
        path.unlink(missing_ok=True)
        return
    content = {"model": "aslseg", **event.details, "round": event.round, "time": event.time}
    if not path.exists() or path.read_text().find(event.time) < 0:
        write_json(path, content)
