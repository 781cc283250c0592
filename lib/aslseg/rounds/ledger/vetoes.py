"""What somebody took back: a mask that is not promoted again, a model that is not published again.

A veto is for one mask or one model, known by its hash, and for masks that are nearly the same. It ends where a person
labels the scan; new models may draw another mask.
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping

from aslseg.cases.studies import FINAL, PSEUDO
from aslseg.rounds.ledger.ledger import Entry, Ledger

MASK_VETO = "this mask was rolled back; a human label or another mask is needed"


def mask_vetoes(ledger: Ledger) -> dict[str, set[str]]:
    """Case to the hashes of its masks that may not be promoted."""
    found: dict[str, set[str]] = {}
    for event in ledger.events(kinds=("veto", "saved")):
        case = event.case or ""
        if event.kind == "veto" and event.tag == PSEUDO:
            found.setdefault(case, set()).add(event.details["sha256"])
        elif event.kind == "saved" and event.tag == FINAL:
            found.pop(case, None)
    return found


def model_vetoes(ledger: Ledger) -> set[str]:
    """Hashes of the models that may not be published."""
    return {e.details["sha256"] for e in ledger.events(kinds=("veto",)) if e.tag is None}


def veto_masks(masks: Mapping[str, set[str]], why: str) -> list[Entry]:
    """Events of vetoes, for masks by case."""
    pairs = ((case, digest) for case in sorted(masks) for digest in sorted(masks[case]))
    return [Entry("veto", None, c, PSEUDO, {"sha256": digest, "why": why, "by": account()}) for c, digest in pairs]


def veto_model(kind: str, digest: str, why: str) -> Entry:
    """The event of a veto for a model."""
    return Entry("veto", details={"model": kind, "sha256": digest, "why": why, "by": account()})


def account() -> str:
    """Who runs this process: rolling back needs an account on the machine."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
