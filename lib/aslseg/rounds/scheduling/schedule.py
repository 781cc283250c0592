"""When rounds run by themselves: the nights that the setting ``night`` describes, across midnight and summer time.

Nothing here reads a clock but :func:`utc_now`; every other function is given the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from aslseg.settings import Settings
from aslseg.settings.windows import Window

DAYS = 15
"""Days that are looked at before and after a moment: a window opens once a week, or in two if summer time skips it."""


def utc_now() -> datetime:
    """The time now, with its zone, UTC."""
    return datetime.now(UTC)


def zone_of(settings: Settings) -> ZoneInfo | None:
    """The zone of the setting ``time_zone``; None for that of the machine."""
    return ZoneInfo(settings.time_zone) if settings.time_zone else None


def clock_text(moment: datetime, settings: Settings) -> str:
    """A moment as a person there reads it off a clock: ``03:40``."""
    return moment.astimezone(zone_of(settings)).strftime("%H:%M")


def finish_text(progress: Mapping[str, Any], settings: Settings) -> str:
    """When a running round is done, ``about 03:40``; empty where that is not known.

    Args:
        progress: From :func:`aslseg.rounds.scheduling.progress.read_progress`.
        settings: ``time_zone``.
    """
    finish = progress.get("finish") if progress.get("state") == "running" else None
    return f"about {clock_text(datetime.fromisoformat(finish), settings)}" if finish else ""


@dataclass(frozen=True)
class Night:
    """One opening of a window; both moments in UTC."""

    opens: datetime
    closes: datetime

    @property
    def key(self) -> str:
        """Names the night in the ledger, whatever the zone: ``2026-11-26T21:00:00+00:00``."""
        return self.opens.isoformat("T", "seconds")


@dataclass(frozen=True)
class Schedule:
    """Windows in a time zone.

    A time that summer time skips is read with the offset before the change, a time that comes twice is its first; a
    window that this leaves empty does not open on that day. Windows that overlap are one night.

    Attributes:
        windows: From the setting ``night``.
        zone: None for that of the machine.
    """

    windows: tuple[Window, ...]
    zone: ZoneInfo | None = None

    @classmethod
    def of(cls, settings: Settings) -> Schedule:
        """The schedule of the settings ``night`` and ``time_zone``."""
        return cls(settings.night, zone_of(settings))

    def open_at(self, now: datetime) -> Night | None:
        """The night that is open, from its opening on and before its close."""
        return next((n for n in self._around(now) if n.opens <= now < n.closes), None)

    def next_after(self, now: datetime) -> Night | None:
        """The first night that opens after a moment."""
        return next((n for n in self._around(now) if n.opens > now), None)

    def last_closed(self, now: datetime) -> Night | None:
        """The last night that had closed by a moment."""
        return next((n for n in reversed(self._around(now)) if n.closes <= now), None)

    def _around(self, now: datetime) -> list[Night]:
        """The nights of the days around a moment, in their order."""
        today = now.astimezone(self.zone).date()
        days = [today + timedelta(days=n) for n in range(-DAYS, DAYS + 1)]
        found = [self._night(w, day) for w in self.windows for day in days if day.weekday() in w.days]
        merged: list[Night] = []
        for night in sorted((n for n in found if n.closes > n.opens), key=lambda n: n.opens):
            if merged and night.opens < merged[-1].closes:
                merged[-1] = Night(merged[-1].opens, max(night.closes, merged[-1].closes))
            else:
                merged.append(night)
        return merged

    def _night(self, window: Window, day: date) -> Night:
        return Night(self._moment(day, window.opens), self._moment(day, window.closes))

    def _moment(self, day: date, minutes: int) -> datetime:
        wall = datetime.combine(day, time()) + timedelta(minutes=minutes)
        # astimezone takes a time without a zone for the machine's, with its summer time
        return (wall.replace(tzinfo=self.zone) if self.zone else wall).astimezone(UTC)
