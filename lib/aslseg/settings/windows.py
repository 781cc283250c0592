"""Windows of time in a week, as the setting ``night`` writes them: ``mon-fri 22:00-06:00,sat+sun 20:00-10:00``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from aslseg.registry import suggest

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = 24 * 60
_PART = re.compile(r"(?:(?P<days>[a-z+-]+)\s+)?(?P<opens>\d?\d:\d\d)\s*-\s*(?P<closes>\d?\d:\d\d)")


@dataclass(frozen=True)
class Window:
    """A window that opens on some days of the week.

    Attributes:
        days: Weekdays on which it opens, 0 for Monday, sorted.
        opens: Minutes after midnight.
        closes: Minutes after midnight of the day on which it opens; more than 1440 on the day after.
    """

    days: tuple[int, ...]
    opens: int
    closes: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """From ``22:00-06:00``, which is every day, or ``mon-fri 22:00-06:00``; a close at 24:00 is midnight.

        Raises:
            ValueError: The text is no window.
        """
        found = _PART.fullmatch(text.strip().lower())
        if not found:
            raise ValueError(f"expected HH:MM-HH:MM with days before it if wanted (mon-fri 22:00-06:00), got {text!r}")
        opens, closes = _minutes(found["opens"]), _minutes(found["closes"])
        if opens in (DAY, closes):
            raise ValueError(f"{text.strip()!r} opens and closes at once; 00:00-24:00 is the whole day")
        return cls(_days(found["days"]), opens, closes if closes > opens else closes + DAY)

    def __str__(self) -> str:
        closes = self.closes if self.closes <= DAY else self.closes - DAY
        days = "" if len(self.days) == len(DAYS) else "+".join(DAYS[day] for day in self.days) + " "
        return f"{days}{_clock(self.opens)}-{_clock(closes)}"


def parse_windows(text: str) -> tuple[Window, ...]:
    """Windows with commas between them; none from an empty text.

    Raises:
        ValueError: A part is no window.
    """
    return tuple(Window.parse(part) for part in text.split(",") if part.strip())


def check_zone(text: str) -> str:
    """The name of a time zone (``Europe/Berlin``), or an empty text for that of the machine.

    Raises:
        ValueError: There is no such zone here.
    """
    try:
        ZoneInfo(text or "UTC")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        known = sorted(available_timezones())
        remedy = suggest(text, known) if known else "this machine has none; install the system's package tzdata"
        raise ValueError(f"unknown time zone {text!r}; {remedy[:200]}") from None
    return text


def _days(text: str | None) -> tuple[int, ...]:
    found: set[int] = set()
    for part in (text or "mon-sun").split("+"):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"unknown days {part!r}; expected {', '.join(DAYS)}, joined by - or +")
        start, length = DAYS.index(first), (DAYS.index(last or first) - DAYS.index(first)) % len(DAYS)
        found |= {(start + n) % len(DAYS) for n in range(length + 1)}
    return tuple(sorted(found))


def _minutes(text: str) -> int:
    hours, minutes = map(int, text.split(":"))
    if minutes > 59 or 60 * hours + minutes > DAY:
        raise ValueError(f"{text} is no time of day; expected 00:00 to 24:00")
    return 60 * hours + minutes


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"
