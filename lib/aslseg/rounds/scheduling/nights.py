"""What is due by the schedule, as the ledger's events say: nights, new labels, and stops by a person.

Every start and every stop is an event, so that servers and commands that share a studies folder agree, and a server
that was killed goes on. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from aslseg.cases.studies import FINAL, Studies
from aslseg.files import FileStamp
from aslseg.rounds.ledger.ledger import Entry, Event, Ledger
from aslseg.rounds.scheduling.schedule import Night, Schedule
from aslseg.settings import Settings, relevant
from aslseg.settings.groups import GROUPS

logger = logging.getLogger(__name__)

STARTED, STOPPED, NIGHT = "started", "stopped", "night"
"""Kinds of events: a start, a stop by a person, and what became of a night."""
CONSIDERED = (STARTED, STOPPED, NIGHT, "opened", "closed", "saved")
BARE = ("opened", "closed", "saved")
"""Of these only when they happened counts; a round's summary is large, and of saved labels there are many."""
SCHEDULED = "scheduled"
"""Outcome of a night that no round belongs to: from here on nights are expected."""
AHEAD = timedelta(hours=36)
"""Events that lie further ahead than this were written before the clock was moved back, and are passed over."""
MOST_STARTS = 5
"""How often the round of a night, or after new labels, is started, if its process is killed each time."""
SETTLED_ROUNDS = 2
"""Rounds in a row that must have changed nothing before no further one is run."""


@dataclass(frozen=True)
class Start:
    """A round that is due.

    Attributes:
        why: In words.
        night: The night that it belongs to; for new labels one of its own, which opens and closes at once.
        until: When it has to end; None for no end.
        labels: How many new labels it is for; 0 for that of a night.
    """

    why: str
    night: Night
    until: datetime | None = None
    labels: int = 0


class Nights:
    """The schedule of one studies folder.

    Args:
        ledger: Where starts, stops and nights are noted.
        settings: ``night``, ``time_zone``, ``night_hours``, ``after_labels``.
    """

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self.ledger, self.settings = ledger, settings
        self.schedule = Schedule.of(settings)

    def due(self, now: datetime) -> Start | None:
        """The round that has to start now, if there is one."""
        events = self._events(now)
        return self._night_due(events, now) or self._labels_due(events, now)

    def commanded(self, now: datetime) -> Start | str:
        """What ``aslseg nightly`` runs now: what is due, or without any schedule a night of its own; else why not."""
        if not self.schedule.windows and not self.settings.after_labels:
            hours = self.settings.night_hours
            until = now + timedelta(hours=hours) if hours else None
            return Start("aslseg nightly", Night(now, now), until)
        due = self.due(now)
        if due is not None:
            return due
        stop, coming = self.held(), self.schedule.next_after(now)
        if stop is not None:
            return f"stopped by {stop.details['by']} at {stop.details['at']}; nothing starts before Train or a night"
        if self.schedule.open_at(now) is not None:
            return "this night has had its round"
        return f"no round is due before {_text(coming.opens)}" if coming else "no round is due: too few new labels"

    def expect(self, now: datetime) -> None:
        """Note that nights are expected from now on, at the first time with these windows."""
        if self.schedule.windows and self._expected(self._events(now)) is None:
            self._append(NIGHT, now, opens=_text(now), outcome=SCHEDULED, windows=self._windows())

    def note_start(self, start: Start, now: datetime) -> None:
        """A round starts by the schedule."""
        labels = {"labels": start.labels} if start.labels else {}
        self._append(STARTED, now, by="schedule", why=start.why, night=start.night.key, **labels)

    def note_train(self, by: str | None, now: datetime) -> None:
        """A person starts a round; a stop before it no longer holds."""
        self._append(STARTED, now, by=by or "a client", why="Train")

    def note_stop(self, by: str | None, now: datetime) -> None:
        """A person stops the training; nothing starts by itself until a person or the next night starts it."""
        self._append(STOPPED, now, by=by or "a client")

    def note_end(self, opens: str, outcome: str, now: datetime) -> None:
        """A night is over.

        Args:
            opens: :attr:`Night.key`.
            outcome: In words.
            now: The time.
        """
        self._append(NIGHT, now, opens=opens, outcome=outcome)

    def held(self) -> Event | None:
        """The stop by a person that still holds."""
        return _held(self.ledger.events(kinds=(STARTED, STOPPED, "opened", "closed"), bare=BARE))

    def state(self, now: datetime) -> dict[str, Any]:
        """``next`` opening, ``open`` until, ``held`` since, ``last`` night with its outcome; for people."""
        events = self._events(now, CONSIDERED[:-1])  # of saved labels there may be thousands
        stop, coming, current = _held(events), self.schedule.next_after(now), self.schedule.open_at(now)
        ended = [e for e in events if e.kind == NIGHT and e.details["outcome"] != SCHEDULED]
        return {
            "next": _text(coming.opens) if coming else None,
            "open": _text(current.closes) if current else None,
            "held": stop.details if stop else None,
            "last": ended[-1].details if ended else None,
            "after_labels": self.settings.after_labels,
        }

    def _append(self, kind: str, now: datetime, **details: Any) -> None:
        self.ledger.append([Entry(kind, details={"at": _text(now), **details})])

    def _events(self, now: datetime, kinds: tuple[str, ...] = CONSIDERED) -> list[Event]:
        found = self.ledger.events(kinds=kinds, bare=BARE)
        return [e for e in found if _at(e) <= now + AHEAD]

    def _windows(self) -> dict[str, Any]:
        return self.settings.model_dump(include={"night", "time_zone"})

    def _expected(self, events: Sequence[Event]) -> Event | None:
        """From when on nights are expected; None if that was noted last for other windows, or never."""
        noted = [e for e in events if e.kind == NIGHT and e.details["outcome"] == SCHEDULED]
        return noted[-1] if noted and noted[-1].details["windows"] == self._windows() else None

    def _night_due(self, events: Sequence[Event], now: datetime) -> Start | None:
        night = self.schedule.open_at(now)
        if night is not None:
            return self._start(events, night, night.closes, "the night", now)
        missed = self.schedule.last_closed(now)
        if missed is None or not self._missed(events, missed):
            return None
        begun = [_at(e) for e in events if e.details.get("night") == missed.key]
        ends = min([*begun, now]) + (missed.closes - missed.opens)
        return self._start(events, missed, ends, "a night that was missed", now)

    def _missed(self, events: Sequence[Event], night: Night) -> bool:
        """Whether this night was expected before it opened, and no round has begun or ended since then."""
        expected = self._expected(events)
        since = [e for e in events if e.kind in ("opened", "closed") and _at(e) >= night.opens]
        ours = [e for e in events if e.details.get("night") == night.key]
        return expected is not None and _at(expected) <= night.opens and (bool(ours) or not since)

    def _start(self, events: Sequence[Event], night: Night, ends: datetime, why: str, now: datetime) -> Start | None:
        """The round of a night, unless that night has had its round or was stopped."""
        over = [e for e in events if e.kind == NIGHT and e.details["outcome"] != SCHEDULED]
        stop = _held(events)
        if any(e.details["opens"] >= night.key for e in over) or (stop is not None and _at(stop) >= night.opens):
            return None
        begun = [e for e in events if e.details.get("night") == night.key]
        # a process may be killed between the end of its round and the note on it
        ended = any(e.kind == "closed" and e.seq > begun[0].seq for e in events) if begun else False
        if ended or len(begun) >= MOST_STARTS:
            return None
        if self.settings.night_hours:
            ends = min(ends, min([*map(_at, begun), now]) + timedelta(hours=self.settings.night_hours))
        return Start(why, night, ends) if now < ends else None

    def _labels_due(self, events: Sequence[Event], now: datetime) -> Start | None:
        wanted = self.settings.after_labels
        if not wanted or _held(events) is not None:
            return None
        killed = _killed(events)
        if killed is not None:
            return killed
        last = max((e.seq for e in events if e.kind in (STARTED, "opened")), default=0)
        new = {e.case for e in events if e.kind == "saved" and e.tag == FINAL and e.seq > last}
        return Start(_counted(len(new)), Night(now, now), labels=len(new)) if len(new) >= wanted else None


def last_failed(ledger: Ledger) -> bool:
    """Whether a failure is the last thing that is noted of nights and rounds.

    Args:
        ledger: Of the studies folder.
    """
    events = ledger.events(kinds=(NIGHT, "failed", "closed"), bare=BARE)
    ends = [e for e in events if e.details.get("outcome") != SCHEDULED]
    return bool(ends) and (ends[-1].kind == "failed" or ends[-1].details.get("outcome", "").startswith("failed"))


def inputs_hash(studies: Studies, settings: Settings) -> str:
    """Hash of everything that people decide of a round: scans, human labels, patients, settings.

    Files count by name, size and time of their last change, so that hundreds of scans need not be read.
    """
    files = [*studies.images.values(), *studies.final.values(), studies.root / "patients.csv"]
    stamps = [[str(p.relative_to(studies.root)), *_stamp(p)] for p in files]
    groups = set(GROUPS) - {"clicks", "server", "machine", "night"}
    text = json.dumps([stamps, relevant(settings, *groups)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def settled(ledger: Ledger, inputs: str) -> str | None:
    """Why a further round would change nothing, in words; None if it may change something.

    Args:
        ledger: Of the studies folder.
        inputs: :func:`inputs_hash` now.
    """
    rounds = [r for r in ledger.rounds() if r.state != "rolled back"]
    if len(rounds) < SETTLED_ROUNDS or any(r.state == "open" for r in rounds):
        return None
    last = rounds[-SETTLED_ROUNDS:]
    if any(r.summary.get("inputs") != inputs or ledger.events(kinds=("published",), number=r.number) for r in last):
        return None
    ends = [e.seq for e in ledger.events(kinds=("closed",), number=last[-1].number)]
    if any(e.seq > max(ends, default=0) for e in ledger.events(kinds=("veto", "rolled back"))):
        return None  # somebody took something back, which the next round leaves out
    return (
        f"settled: rounds {last[0].number} to {last[-1].number} gave no better model, and scans, labels and settings "
        "are what they were. The next label, scan, setting or rollback starts rounds again"
    )


def _killed(events: Sequence[Event]) -> Start | None:
    """The round after new labels whose process ended before it could note an outcome; no round must run now."""
    ran = [e for e in events if e.kind in (STARTED, STOPPED, NIGHT, "closed") and e.details.get("outcome") != SCHEDULED]
    if not ran or not ran[-1].details.get("labels"):
        return None
    key, count = ran[-1].details["night"], ran[-1].details["labels"]
    if sum(e.kind == STARTED and e.details.get("night") == key for e in ran) >= MOST_STARTS:
        return None
    opened = datetime.fromisoformat(key)
    return Start(f"{_counted(count)}, again", Night(opened, opened), labels=count)


def _counted(labels: int) -> str:
    return f"{labels} new label{'' if labels == 1 else 's'}"


def _held(events: Sequence[Event]) -> Event | None:
    last = [e for e in events if e.kind in (STARTED, STOPPED, "opened", "closed")]
    return last[-1] if last and last[-1].kind == STOPPED else None


def _at(event: Event) -> datetime:
    """When it happened: by the scheduler's clock where that noted it, else by the ledger's."""
    return datetime.fromisoformat(event.details.get("at") or event.time)


def _text(moment: datetime) -> str:
    return moment.isoformat("T", "seconds")


def _stamp(path: Path) -> list[int]:
    stamp = FileStamp.of(path)
    return [stamp.size, stamp.mtime_ns] if stamp else []
