"""The machine's label files: the ledger says which mask belongs where, and the files are brought in line.

Every mask that a round made is kept once, by its hash, under ``home/masks``. A change is first appended to the ledger
and then carried out by :func:`sync_label_files`, which can be run again after a kill. ``final`` is never touched.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.errors import LedgerError
from aslseg.files import atomic_file, sha256, write_json
from aslseg.models.published import put_manifest
from aslseg.rounds.ledger import Entry, Event, Ledger
from aslseg.rounds.lock import round_lock
from aslseg.settings import Paths
from aslseg.volume.io import case_id, extension, write_label

KEEP_ROUNDS = 5


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
        rounds = [r for r in ledger.rounds() if r.state != "rolled back"]
        first = rounds[-KEEP_ROUNDS].seq if len(rounds) > KEEP_ROUNDS else 0
        needed: set[str] = set()
        for tag in (ORIGINAL, PSEUDO):
            for event in (*ledger.masks(tag).values(), *ledger.masks(tag, before=first).values()):
                needed |= _hashes(event.details)
            for event in ledger.events(kinds=("mask",), tag=tag):
                needed |= _hashes(event.details) if event.seq >= first else set()
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


def _hashes(details: dict[str, Any]) -> set[str]:
    return {h for h in (details.get("sha256"), details.get("disagreement")) if h}


def plan_label_changes(
    ledger: Ledger, studies: Studies, tag: str, number: int, wanted: dict[str, dict[str, Any]]
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
    """
    now, entries = ledger.masks(tag), []
    store = MaskStore(ledger.path.parent)
    human = human_labels(studies.root)
    for case, details in sorted(wanted.items()):
        if case in human:
            entries.append(Entry("note", number, case, tag, {"why": "a human label was saved meanwhile; it wins"}))
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
        if tag == PSEUDO and old.kind == "mask" and (case in human or case not in wanted):
            why = "a human label was saved" if case in human else "not promoted in this round"
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
            if case not in studies.images or (case in human and event.kind == "mask"):
                continue
            if _sync_one(studies.label_path(tag, case), event, store):
                changed.append(f"{tag}/{case}")
            if tag == ORIGINAL:
                _sidecar(paths.home / "original" / f"{case}.json", event)
    return changed


def verify_label_files(paths: Paths) -> list[str]:
    """Differences from the ledger: a broken chain, label files changed or missing; empty if there are none."""
    ledger = Ledger(paths.ledger)
    broken = ledger.verify()
    problems = [f"{paths.ledger}: {broken}"] if broken else []
    if paths.studies is None:
        return problems
    studies, human = read_studies(paths.studies), human_labels(paths.studies)
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


def roll_back(paths: Paths, number: int) -> list[str]:
    """Undo a round and every later one: promoted masks, ``original`` masks and published models.

    Label files become byte for byte what they were before that round, except where a human has saved one since.

    Returns:
        Lines that say what was done.

    Raises:
        LedgerError: No such round, or its masks are no longer kept.
        RoundRunningError: A round is running.
    """
    if paths.studies is None:
        raise LedgerError("rollback needs the studies folder; give --studies DIR")
    ledger, studies = Ledger(paths.ledger), read_studies(paths.studies)
    rounds = {r.number: r for r in ledger.rounds()}
    if number not in rounds:
        known = ", ".join(map(str, rounds)) or "none yet"
        raise LedgerError(f"there is no round {number} in {paths.ledger}; rounds: {known}")
    with round_lock(paths.home):
        first = rounds[number].seq
        undone = [n for n, r in rounds.items() if n >= number and r.state != "rolled back"]
        if not undone or rounds[number].state == "rolled back":
            sync_label_files(ledger, studies, paths)
            return [f"round {number} was rolled back before; nothing to do"]
        # a killed round may have left files behind the ledger, which would not be recognised as ours below
        sync_label_files(ledger, studies, paths)
        entries = [e for tag in (PSEUDO, ORIGINAL) for e in _restoring_entries(ledger, tag, first, number)]
        published = [e for e in ledger.events(kinds=("published",)) if e.seq > first]
        lines = [f"round {n} rolled back" for n in undone]
        if published:
            # before the ledger, so that a rollback that is killed here can be repeated
            put_manifest(paths, published[0].details["before"])
            kinds = ", ".join(sorted(published[0].details["before"])) or "none"
            lines.append(f"published models are those from before round {number}: {kinds}")
            before = {"before": published[-1].details["after"], "after": published[0].details["before"]}
            entries.append(Entry("published", None, details=before | {"why": f"rollback of round {number}"}))
        entries += [Entry("rolled back", n, details={"by": f"rollback of round {number}"}) for n in undone]
        ledger.append(entries)
        lines += [f"{name}: as before round {number}" for name in sync_label_files(ledger, studies, paths)]
    return lines


def _restoring_entries(ledger: Ledger, tag: str, first: int, number: int) -> list[Entry]:
    """Events that restore the masks of a tag to their state before event ``first``."""
    then, entries = ledger.masks(tag, before=first), []
    for case, now in sorted(ledger.masks(tag).items()):
        old = then.get(case)
        if old is None:
            # the file that was there before our first mask was recorded within the round itself
            found = [e for e in ledger.events(kinds=("mask",), tag=tag) if e.case == case and e.round is None]
            old = found[0] if found else None
        if old is not None and old.seq == now.seq:
            continue
        if old is None or old.kind == "removed":
            was = now.details.get("sha256") or now.details.get("was")
            entries.append(Entry("removed", None, case, tag, {"why": f"rollback of round {number}", "was": was}))
        else:
            if not MaskStore(ledger.path.parent).path(old.details["sha256"]).exists():
                raise LedgerError(
                    f"round {number} cannot be rolled back: the masks of before it are no longer kept "
                    f"(the last {KEEP_ROUNDS} rounds are)"
                )
            details = old.details | {"restored": old.details.get("restored") or old.seq}
            entries.append(Entry("mask", old.round, case, tag, details))
    return entries
