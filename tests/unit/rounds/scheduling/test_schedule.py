"""Windows of the week, across midnight and summer time."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from aslseg.errors import BadSettingsError
from aslseg.rounds.scheduling.schedule import Night, Schedule, clock_text, finish_text
from aslseg.settings import load_settings
from aslseg.settings.windows import Window, parse_windows

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo | None = BERLIN) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone).astimezone(UTC)


def schedule(text: str, zone: ZoneInfo | None = BERLIN) -> Schedule:
    return Schedule(parse_windows(text), zone)


@pytest.mark.parametrize(
    "text", ["22:00-06:00", "mon+tue+wed+thu+fri 22:00-06:00", "sat+sun 00:00-24:00,mon 01:30-02:00", ""]
)
def test_windows_are_written_as_they_are_read(text: str) -> None:
    assert ",".join(map(str, parse_windows(text))) == text
    found, _ = load_settings({"night": text}, env={})
    assert found.model_dump()["night"] == text


def test_days_may_be_ranges_over_the_week_end() -> None:
    assert parse_windows("FRI-mon 9:00 - 10:00")[0] == Window((0, 4, 5, 6), 540, 600)


@pytest.mark.parametrize(
    ("conf", "said"),
    [
        ({"night": "22-6"}, "expected HH:MM-HH:MM"),
        ({"night": "xyz 22:00-06:00"}, "unknown days 'xyz'"),
        ({"night": "25:00-06:00"}, "25:00 is no time of day"),
        ({"night": "22:61-06:00"}, "22:61 is no time of day"),
        ({"night": "22:00-22:00"}, "the whole day"),
        ({"night": "24:00-06:00"}, "the whole day"),
        ({"time_zone": "Europe/Berln"}, "did you mean 'Europe/Berlin'?"),
        ({"time_zone": "../etc/passwd"}, "unknown time zone"),
        ({"after_labels": "-1"}, "after_labels"),
    ],
)
def test_what_is_no_window_is_refused(conf: dict[str, str], said: str) -> None:
    with pytest.raises(BadSettingsError, match=said.replace("?", r"\?")):
        load_settings(conf, env={})


def test_a_window_across_midnight() -> None:
    nights = schedule("mon-fri 22:00-06:00")
    # 2026-11-27 is a Friday
    friday = Night(at("2026-11-27 22:00"), at("2026-11-28 06:00"))
    assert nights.open_at(at("2026-11-27 21:59")) is None
    assert nights.open_at(at("2026-11-27 22:00")) == friday
    assert nights.open_at(at("2026-11-28 05:59")) == friday
    assert nights.open_at(at("2026-11-28 06:00")) is None
    assert nights.last_closed(at("2026-11-28 06:00")) == friday
    assert nights.open_at(at("2026-11-28 23:00")) is None, "no window opens on Saturday"
    assert nights.next_after(at("2026-11-28 12:00")) == Night(at("2026-11-30 22:00"), at("2026-12-01 06:00"))
    assert friday.key == "2026-11-27T21:00:00+00:00"


def test_summer_time() -> None:
    nights = schedule("22:00-06:00")
    spring, autumn = nights.open_at(at("2026-03-29 00:00")), nights.open_at(at("2026-10-25 00:00"))
    assert spring is not None
    assert autumn is not None
    assert spring.closes - spring.opens == timedelta(hours=7)
    assert autumn.closes - autumn.opens == timedelta(hours=9)
    # the clock goes from 02:00 to 03:00: this window is not there on that day, and is a day later
    skipped = schedule("02:30-03:00")
    assert skipped.open_at(at("2026-03-29 02:45")) is None
    assert skipped.next_after(at("2026-03-29 00:00")) == Night(at("2026-03-30 02:30"), at("2026-03-30 03:00"))
    weekly = schedule("sun 02:30-03:00")
    following = Night(at("2026-04-05 02:30"), at("2026-04-05 03:00"))
    assert weekly.next_after(at("2026-03-23 12:00")) == following
    assert weekly.last_closed(at("2026-04-04 12:00")) == Night(at("2026-03-22 02:30"), at("2026-03-22 03:00"))
    # the clock goes from 03:00 back to 02:00: the first of the two
    twice = schedule("02:15-02:45").open_at(datetime(2026, 10, 25, 0, 30, tzinfo=UTC))
    assert twice == Night(datetime(2026, 10, 25, 0, 15, tzinfo=UTC), datetime(2026, 10, 25, 0, 45, tzinfo=UTC))


def test_the_zone_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.environ.get("TZ")
    try:
        monkeypatch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        here = schedule("22:00-06:00", None)
        assert here.open_at(at("2026-07-01 23:00")) == schedule("22:00-06:00").open_at(at("2026-07-01 23:00"))
        spring = here.open_at(at("2026-03-29 00:00"))
        assert spring is not None
        assert spring.closes - spring.opens == timedelta(hours=7)
    finally:
        if before is None:
            monkeypatch.delenv("TZ")
        else:
            monkeypatch.setenv("TZ", before)
        time.tzset()


def test_windows_that_overlap_are_one_night_and_those_that_touch_are_two() -> None:
    both = schedule("fri 22:00-06:00,sat 00:00-24:00")
    assert both.open_at(at("2026-11-28 12:00")) == Night(at("2026-11-27 22:00"), at("2026-11-29 00:00"))
    always = schedule("00:00-24:00")
    assert always.open_at(at("2026-11-28 12:00")) == Night(at("2026-11-28 00:00"), at("2026-11-29 00:00"))


def test_no_window_is_never_open() -> None:
    never, now = schedule(""), at("2026-11-28 12:00")
    assert (never.open_at(now), never.next_after(now), never.last_closed(now)) == (None, None, None)


def test_times_are_shown_in_the_zone_of_the_settings() -> None:
    settings, _ = load_settings({"time_zone": "Europe/Berlin"}, env={})
    assert clock_text(datetime(2026, 11, 27, 2, 40, tzinfo=UTC), settings) == "03:40"
    running = {"state": "running", "finish": "2026-11-27T02:40:00+00:00"}
    assert finish_text(running, settings) == "about 03:40"
    assert finish_text(running | {"state": "done"}, settings) == ""
    assert finish_text({"state": "none"}, settings) == ""
