"""What people do while a round runs: a label that they save, a scan that they replace or delete, ends its promotion."""

from __future__ import annotations

from collections.abc import Iterable

from aslseg.cases.studies import PSEUDO, read_studies
from aslseg.rounds.feedback.corrections import record_checked
from aslseg.rounds.label_files.masks import HUMAN_WINS, human_labels, sync_label_files
from aslseg.rounds.ledger.ledger import Entry
from aslseg.rounds.steps.pipeline import RoundPipeline

DELETED, REPLACED = "the scan was deleted meanwhile", "the scan was replaced meanwhile"
NOT_USED = "its scan is not one of the unlabelled ones any more"


def late_changes(pipeline: RoundPipeline, cases: Iterable[str]) -> dict[str, str]:
    """Cases whose machine mask may no longer be used, and why.

    Args:
        pipeline: The round.
        cases: Of its cases without a label.
    """
    if pipeline.paths.studies is None:
        return {}
    human = human_labels(pipeline.paths.studies)
    prepared = {c.id: c.image_hash for c in pipeline.cases.without_label}
    found = {case: HUMAN_WINS if case in human else _scan_change(pipeline, case, prepared[case]) for case in cases}
    return {case: why for case, why in found.items() if why}


def _scan_change(pipeline: RoundPipeline, case: str, prepared: str) -> str:
    try:
        return "" if pipeline.cases.hashes(pipeline.cases.sources[case].image) == prepared else REPLACED
    except FileNotFoundError:
        return DELETED


def drop_late(pipeline: RoundPipeline, tag: str, cases: Iterable[str]) -> dict[str, str]:
    """Take back masks that were recorded and may no longer be used: in the ledger, and as label files.

    A scan with a human label keeps its ``original``, which shows what the machine had drawn.

    Returns:
        Case to the reason, as :func:`late_changes`.
    """
    late = late_changes(pipeline, cases)
    now = pipeline.ledger.masks(tag)
    gone = {c: why for c, why in late.items() if tag == PSEUDO or why != HUMAN_WINS}
    entries = [
        Entry("removed", pipeline.number, case, tag, {"why": why, "was": now[case].details["sha256"]})
        for case, why in sorted(gone.items())
        if case in now and now[case].kind == "mask"
    ]
    if entries and pipeline.paths.studies is not None:
        record_checked(pipeline.paths, pipeline.settings)
        pipeline.ledger.append(entries)
        sync_label_files(pipeline.ledger, read_studies(pipeline.paths.studies), pipeline.paths)
    if tag == PSEUDO:
        pipeline.dropped |= late
    return late
