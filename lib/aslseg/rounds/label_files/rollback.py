"""Taking back: a round with all later ones, one model, one promoted mask, or the promotions of a rejected round.

Nothing is removed from the ledger: events are added that lead back to an earlier state, and the files follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aslseg.cases.studies import ORIGINAL, PSEUDO, Studies, read_studies
from aslseg.errors import LedgerError
from aslseg.models.published import manifest, put_manifest
from aslseg.rounds.label_files.masks import KEEP_ROUNDS, MaskStore, sync_label_files
from aslseg.rounds.ledger.ledger import Entry, Event, Ledger
from aslseg.rounds.ledger.vetoes import mask_vetoes, model_vetoes, veto_masks, veto_model
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.settings import Paths


@contextmanager
def _held(paths: Paths) -> Iterator[tuple[Ledger, Studies]]:
    """Ledger and studies while no round runs, with the label files as the ledger says."""
    if paths.studies is None:
        raise LedgerError("rollback needs the studies folder; give --studies DIR")
    ledger, studies = Ledger(paths.ledger), read_studies(paths.studies)
    with round_lock(paths.home):
        ledger.require_whole()
        # a killed round may have left files behind the ledger, which would not be recognised as ours
        sync_label_files(ledger, studies, paths)
        yield ledger, studies


def roll_back(paths: Paths, number: int) -> list[str]:
    """Undo a round and every later one: promoted masks, ``original`` masks and published models.

    Label files become byte for byte what they were before that round, except where a human has saved one since, or has
    taken a mask back. The masks that these rounds promoted are not promoted again
    (:mod:`aslseg.rounds.ledger.vetoes`). In the place of a model that was taken back by itself the one before it is
    served.

    Returns:
        Lines that say what was done.

    Raises:
        LedgerError: No such round, its masks are no longer kept, or the ledger has lost events.
        RoundRunningError: A round is running.
    """
    with _held(paths) as (ledger, studies):
        rounds = {r.number: r for r in ledger.rounds()}
        if number not in rounds:
            known = ", ".join(map(str, rounds)) or "none yet"
            raise LedgerError(f"there is no round {number} in {paths.ledger}; rounds: {known}")
        first, why = rounds[number].seq, f"rollback of round {number}"
        undone = [n for n, r in rounds.items() if n >= number and r.state != "rolled back"]
        if not undone or rounds[number].state == "rolled back":
            return [f"round {number} was rolled back before; nothing to do"]
        entries = [
            *_without_vetoes(ledger, restoring_entries(ledger, PSEUDO, first, why), why),
            *restoring_entries(ledger, ORIGINAL, first, why),
        ]
        entries += veto_masks(_promoted_since(ledger, first), why)
        published = [e for e in ledger.events(kinds=("published",)) if e.seq > first]
        lines = [f"round {n} rolled back" for n in undone]
        if published:
            before = published[-1].details["after"]
            after = _not_taken_back(paths, ledger, published[0])
            _require_kept(paths, after, why)
            # before the ledger, so that a rollback that is killed here can be repeated
            put_manifest(paths, after)
            lines.append(f"published models are those from before round {number}: {', '.join(sorted(after)) or 'none'}")
            entries.append(Entry("published", None, details={"before": before, "after": after, "why": why}))
        entries += [Entry("rolled back", n, details={"by": why}) for n in undone]
        ledger.append(entries)
        lines += [f"{name}: as before round {number}" for name in sync_label_files(ledger, studies, paths)]
    return lines


def roll_back_case(paths: Paths, case: str) -> list[str]:
    """Take back the promotion of one scan; its mask is not promoted again.

    Returns:
        Lines that say what was done.

    Raises:
        LedgerError: The scan has no promoted mask.
        RoundRunningError: A round is running.
    """
    with _held(paths) as (ledger, studies):
        event = ledger.masks(PSEUDO).get(case)
        if event is None or event.kind == "removed":
            promoted = ", ".join(p.case for p in ledger.promotions()) or "none"
            raise LedgerError(f"{case!r} has no promoted mask; promoted now: {promoted}")
        digest, why = event.details["sha256"], f"rollback of {case}"
        removed = Entry("removed", None, case, PSEUDO, {"why": why, "was": digest})
        ledger.append([removed, *veto_masks({case: {digest}}, why)])
        sync_label_files(ledger, studies, paths)
        lines = [f"{case}: no longer promoted; the mask {digest[:12]} is not promoted again"]
        learned = [kind for kind, model in sorted(manifest(paths).items()) if case in model.get("trained_on", ())]
    if learned:
        lines.append(f"published models that learned from it: {', '.join(learned)}; the next round trains without it")
    return lines


def any_file(kind: str, path: Path) -> bool:
    """Whether a model file can be served: every one."""
    return True


def roll_back_model(paths: Paths, kind: str, usable: Callable[[str, Path], bool] = any_file) -> list[str]:
    """Serve the model of a kind that was published before the present one, which is not published again.

    Args:
        paths: Where models and ledger are.
        kind: ``ssl``, ``sam`` or ``adapter``.
        usable: Whether a model file of a kind can be served; others are passed over. Nothing would take the place of
            a model of an earlier version: the next round trains the one that was taken back.

    Returns:
        Lines that say what was done.

    Raises:
        LedgerError: None is published, or no earlier one is kept that can be served.
        RoundRunningError: A round is running.
    """
    with _held(paths) as (ledger, _):
        now = manifest(paths)
        if kind not in now:
            raise LedgerError(f"no {kind} model is published; published: {', '.join(sorted(now)) or 'none'}")
        digest, why = now[kind]["sha256"], f"rollback of model {kind}"
        earlier = _earlier(paths, ledger, kind, {digest, *model_vetoes(ledger)}, usable=usable)
        if earlier is None:
            number = now[kind]["round"]
            remedy = (
                f"`aslseg ledger rollback --round {number}` takes back all of its round" if number else "train another"
            )
            raise LedgerError(
                f"no earlier {kind} model is kept (keep_models) that was not taken back and still loads; {remedy}"
            )
        models = {**now, kind: earlier}
        published = Entry("published", None, details={"before": now, "after": models, "why": why})
        ledger.append([veto_model(kind, digest, why), published])
        put_manifest(paths, models)
    lines = [f"{kind}: {earlier['sha256'][:12]} of round {earlier['round']} is served again"]
    if len(now) > 1:
        lines.append("the other models stay; they were validated with the model that was taken back")
    return lines


def withdraw(
    ledger: Ledger, studies: Studies, paths: Paths, number: int, promoted: Mapping[str, str], late: Mapping[str, str]
) -> None:
    """Take back the promotions of the round that runs, as its model was not published; earlier ones stand again.

    Args:
        ledger, studies, paths: Of the round.
        number: The round.
        promoted: Case to the hash of the mask that the rejected model learned from.
        late: Cases whose earlier promotions cannot stand again, and why.
    """
    opened = {r.number: r.seq for r in ledger.rounds()}[number]
    now, entries = ledger.masks(PSEUDO), []
    for entry in restoring_entries(ledger, PSEUDO, opened, f"round {number} was rejected"):
        case = entry.case or ""
        if entry.kind == "mask" and case in late:
            was = now[case].details.get("sha256") or now[case].details.get("was")
            entries.append(Entry("removed", None, case, PSEUDO, {"why": late[case], "was": was}))
        else:
            entries.append(entry)
    if entries:
        ledger.append([*entries, Entry("withdrawn", number, details={"cases": dict(promoted)})])
        sync_label_files(ledger, studies, paths)


def restoring_entries(ledger: Ledger, tag: str, first: int, why: str) -> list[Entry]:
    """Events that restore the masks of a tag to their state before event ``first``.

    Raises:
        LedgerError: A mask of that time is no longer kept.
    """
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
            entries.append(Entry("removed", None, case, tag, {"why": why, "was": was}))
        else:
            if not MaskStore(ledger.path.parent).path(old.details["sha256"]).exists():
                raise LedgerError(
                    f"{why}: not possible, as the masks of before it are no longer kept (the last {KEEP_ROUNDS} rounds "
                    "are)"
                )
            details = old.details | {"restored": old.details.get("restored") or old.seq}
            entries.append(Entry("mask", old.round, case, tag, details))
    return entries


def _promoted_since(ledger: Ledger, first: int) -> dict[str, set[str]]:
    """Masks that were promoted after an event, by case, without those that were promoted at that time already."""
    then = {(c, e.details["sha256"]) for c, e in ledger.masks(PSEUDO, before=first).items() if e.kind == "mask"}
    since: dict[str, set[str]] = {}
    for event in ledger.events(kinds=("mask",), tag=PSEUDO):
        promoted = event.seq > first and event.round is not None and "restored" not in event.details
        if promoted and (event.case, event.details["sha256"]) not in then:
            since.setdefault(event.case or "", set()).add(event.details["sha256"])
    return since


def _without_vetoes(ledger: Ledger, entries: Sequence[Entry], why: str) -> list[Entry]:
    """Entries that restore promotions, where masks that a person has taken back stay so."""
    vetoes, now, found = mask_vetoes(ledger), ledger.masks(PSEUDO), []
    for entry in entries:
        case = entry.case or ""
        if entry.kind == "removed" or entry.details["sha256"] not in vetoes.get(case, ()):
            found.append(entry)
        elif now[case].kind == "mask":
            details = {"why": why, "was": now[case].details["sha256"]}
            found.append(Entry("removed", None, case, PSEUDO, details))
    return found


def _not_taken_back(paths: Paths, ledger: Ledger, published: Event) -> dict[str, dict[str, Any]]:
    """The manifest of before an event, with earlier models in the place of those that a person has taken back."""
    before, vetoes = published.details["before"], model_vetoes(ledger)
    found = {kind: model for kind, model in before.items() if model["sha256"] not in vetoes}
    for kind in before.keys() - found.keys():
        earlier = _earlier(paths, ledger, kind, vetoes, published.seq)
        found |= {kind: earlier} if earlier else {}
    return found


def _require_kept(paths: Paths, models: dict[str, dict[str, Any]], why: str) -> None:
    missing = [kind for kind, model in models.items() if not (paths.models / str(model["file"])).is_file()]
    if missing:
        raise LedgerError(f"{why}: the {', '.join(missing)} model of that time is no longer kept (keep_models)")


def _earlier(
    paths: Paths,
    ledger: Ledger,
    kind: str,
    passed_over: set[str],
    before: int | None = None,
    usable: Callable[[str, Path], bool] = any_file,
) -> dict[str, Any] | None:
    """The entry of the newest model that was served before, is kept, and is none of those passed over.

    Args:
        paths, ledger, kind: Where it was served, and what it is.
        passed_over: Hashes of models that it may not be.
        before: It was served before this event; None for any time.
        usable: As for :func:`roll_back_model`.
    """
    events: list[Event] = ledger.events(kinds=("published",))
    for event in reversed([e for e in events if before is None or e.seq < before]):
        for models in (event.details["after"], event.details["before"]):
            entry = models.get(kind)
            if entry is None or entry["sha256"] in passed_over:
                continue
            path = paths.models / str(entry["file"])
            if path.is_file() and usable(kind, path):
                return dict(entry)
    return None
