"""A ledger that lost events is continued with what reports, label files and their info say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from aslseg.cases.studies import ORIGINAL, PSEUDO, Studies
from aslseg.files import sha256
from aslseg.models.published import manifest
from aslseg.rounds.label_files.label_info import human_label_infos
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.anchor import read_head
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.ledger.reports import read_reports
from aslseg.rounds.ledger.vetoes import mask_vetoes, model_vetoes
from aslseg.settings import Paths
from aslseg.volume.io import case_id, extension

WHY = "rebuilt"


def rebuild(ledger: Ledger, studies: Studies, paths: Paths, problem: str) -> list[str]:
    """Append an event that says what was lost, and the events that the files still show.

    Rounds, promotions, validation patients and vetoes come from the reports of rounds; ``original`` masks from what is
    kept beside them; human labels from their info; models from the manifest. Label files are only read.

    Args:
        ledger: With as many of its events as there are, which may be none.
        studies, paths: Where the files are.
        problem: What is known to be missing.

    Returns:
        Lines that say what was found.
    """
    known, reports = read_head(ledger.anchor), {path.name: report for path, report in read_reports(paths)}
    lost = {"problem": problem, "head": asdict(known) if known else None, "reports": list(reports)}
    found = [
        *_validation(ledger, list(reports.values())),
        *_masks(ledger, studies, PSEUDO, paths, _promoted_details(list(reports.values()))),
        *_masks(ledger, studies, ORIGINAL, paths, _shown_details(paths)),
        *_saved(ledger, studies),
        *_published(ledger, paths),
        *_taken_back(ledger, studies),
        *_vetoes(ledger, list(reports.values())),
    ]
    rounds = _rounds(ledger, list(reports.values()), found)
    ledger.append([Entry("lost", details=lost), *rounds, *found])
    ledger.accept_head()
    counts = sorted(Counter(e.kind for e in (*rounds, *found)).items())
    shown = ", ".join(f"{n} {kind}" for kind, n in counts) or "none"
    return [f"{ledger.path}: {problem}; this is on record now. Events rebuilt from reports and label files: {shown}"]


def _rounds(ledger: Ledger, reports: list[dict[str, Any]], found: list[Entry]) -> list[Entry]:
    """Rounds that something speaks of and the ledger does not know; all of them are over."""
    summaries = {r["summary"]["round"]: r["summary"] for r in reports}
    served = [m["round"] for e in found if e.kind == "published" for m in e.details["after"].values()]
    named = {*summaries, *(n for n in (*served, *(e.round for e in found)) if n is not None)}
    entries = []
    for number in sorted(named - {r.number for r in ledger.rounds()}):
        entries.append(Entry("opened", number, details={"why": WHY}))
        entries.append(Entry("closed", number, details=summaries.get(number, {"round": number})))
    return entries


def _validation(ledger: Ledger, reports: list[dict[str, Any]]) -> list[Entry]:
    patients = {p for r in reports for p in r["validation_patients"]} - ledger.validation_patients()
    return [Entry("validation", details={"patient": p, "why": WHY}) for p in sorted(patients)]


def _promoted_details(reports: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Case and hash of a promoted mask to what was said of it."""
    return {(case, d["sha256"]): d for r in reports for case, d in r["promoted"].items()}


def _shown_details(paths: Paths) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for path in (paths.home / "original").glob("*.json"):
        try:
            details = dict(json.loads(path.read_text()))
            found[path.stem, str(details["sha256"])] = {k: v for k, v in details.items() if k not in ("model", "time")}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _masks(
    ledger: Ledger, studies: Studies, tag: str, paths: Paths, known: dict[tuple[str, str], dict[str, Any]]
) -> Iterator[Entry]:
    """An event for each label file that the ledger does not know; one of unknown origin counts as found."""
    store, now = MaskStore(paths.home), ledger.masks(tag)
    for path in sorted((studies.root / "labels" / tag).glob("*")):
        case = case_id(path)
        if not extension(path) or path.name[0] == "." or case not in studies.images:
            continue
        digest, old = sha256(path), now.get(case)
        if old is not None and old.kind == "mask" and old.details["sha256"] == digest:
            continue
        details = {k: v for k, v in known.get((case, digest), {}).items() if k != "restored"}
        store.import_file(path)
        if details and all(store.path(h).exists() for h in (details.get("disagreement"), digest) if h):
            yield Entry("mask", details.pop("round", None), case, tag, details | {"why": WHY})
        else:
            yield Entry("mask", None, case, tag, {"sha256": digest, "source": "found", "restored": 0})


def _taken_back(ledger: Ledger, studies: Studies) -> list[Entry]:
    """Promotions without a file: the event that ended them is among those that were lost."""
    return [
        Entry("removed", None, case, PSEUDO, {"why": WHY, "was": event.details["sha256"]})
        for case, event in sorted(ledger.masks(PSEUDO).items())
        if event.kind == "mask" and not studies.label_path(PSEUDO, case).exists()
    ]


def _saved(ledger: Ledger, studies: Studies) -> Iterator[Entry]:
    last = {(e.case, e.tag): e.details["sha256"] for e in ledger.events(kinds=("saved",))}
    for case, tag, path, info in human_label_infos(studies.root):
        digest = info.get("sha256")
        if digest and digest != last.get((case, tag)) and digest == sha256(path):
            details = {"sha256": digest, "by": info.get("user"), "info": info, "why": WHY}
            yield Entry("saved", case=case, tag=tag, details=details)


def _published(ledger: Ledger, paths: Paths) -> list[Entry]:
    events, now = ledger.events(kinds=("published",)), manifest(paths)
    before = events[-1].details["after"] if events else {}
    return [Entry("published", details={"before": before, "after": now, "why": WHY})] if now != before else []


def _vetoes(ledger: Ledger, reports: list[dict[str, Any]]) -> Iterator[Entry]:
    masks, models = mask_vetoes(ledger), model_vetoes(ledger)
    for report in reports[-1:]:
        for case, digests in sorted(report["mask_vetoes"].items()):
            for digest in sorted(set(digests) - masks.get(case, set())):
                yield Entry("veto", case=case, tag=PSEUDO, details={"sha256": digest, "why": WHY})
        for digest in sorted(set(report["model_vetoes"]) - models):
            yield Entry("veto", details={"sha256": digest, "why": WHY})
