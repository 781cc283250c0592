"""What is due by the schedule, with a clock that the test moves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aslseg.rounds.ledger import rows as ledger_module
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.scheduling.nights import MOST_STARTS, Nights, Start, settled
from aslseg.settings import load_settings


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


@pytest.fixture(autouse=True)
def moved(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """The ledger's own clock, which follows the test's."""
    now = [at("27 12:00")]
    monkeypatch.setattr(ledger_module, "utc", lambda: now[0].isoformat())
    return now


def nights(ledger: Ledger, **conf: str) -> Nights:
    return Nights(ledger, load_settings({"time_zone": "UTC"} | conf, env={})[0])


def at(text: str) -> datetime:
    """``27 22:00`` in November 2026; the 27th is a Friday."""
    return datetime.strptime(f"2026 11 {text}", "%Y %m %d %H:%M").replace(tzinfo=UTC)


def run(found: Nights, now: datetime, outcome: str | None = "round 1 is done") -> Start:
    """Start what is due, and end it an hour later unless it is killed."""
    due = found.due(now)
    assert due is not None
    found.note_start(due, now)
    if outcome:
        found.note_end(due.night.key, outcome, now + timedelta(hours=1))
    return due


def test_a_night_runs_once_and_the_next_night_again(ledger: Ledger) -> None:
    found = nights(ledger, night="22:00-06:00")
    found.expect(at("27 12:00"))
    assert found.due(at("27 21:59")) is None
    start = run(found, at("27 22:00"))
    assert start.until == at("28 06:00")
    for now in ("27 23:30", "28 05:59", "28 06:00", "28 12:00", "28 21:59"):
        assert found.due(at(now)) is None, now
    assert run(found, at("28 22:00")).until == at("29 06:00")


def test_a_round_that_was_killed_goes_on_in_the_same_night_within_its_hours(ledger: Ledger) -> None:
    found = nights(ledger, night="22:00-06:00", night_hours="4")
    found.expect(at("27 12:00"))
    assert run(found, at("27 22:00"), None).until == at("28 02:00")
    assert run(found, at("27 23:00"), None).until == at("28 02:00")
    assert found.due(at("28 02:00")) is None
    assert found.due(at("28 09:00")) is None, "its time is used up"
    for minute in range(MOST_STARTS):
        run(found, at(f"28 22:{minute:02}"), None)
    assert found.due(at("28 22:30")) is None, "a process that is killed each time is left alone"
    assert run(found, at("29 22:00")).until == at("30 02:00")


def test_a_night_whose_process_was_killed_after_its_round_has_had_it(ledger: Ledger, moved: list[datetime]) -> None:
    found = nights(ledger, night="22:00-06:00")
    ledger.close_round(ledger.open_round({})[0], {})
    run(found, at("27 22:00"), None)
    number, _ = ledger.open_round({})
    assert found.due(at("27 22:30")) is not None
    moved[0] = at("27 22:40")
    ledger.close_round(number, {})
    for now in ("27 22:41", "28 05:00", "28 09:00"):
        assert found.due(at(now)) is None, now
    assert found.due(at("28 22:00")) is not None


def test_missed_nights_are_made_up_once(ledger: Ledger) -> None:
    found = nights(ledger, night="22:00-06:00")
    assert found.due(at("27 12:00")) is None, "nothing was expected before"
    found.expect(at("27 12:00"))
    # three nights later the machine is on again
    start = run(found, at("30 09:00"), None)
    assert "missed" in start.why
    assert start.until == at("30 17:00")
    assert run(found, at("30 10:00")).until == at("30 17:00")
    assert found.due(at("30 12:00")) is None
    assert run(found, at("30 22:00")).why == "the night"


def test_a_night_in_which_a_person_ran_a_round_was_not_missed(ledger: Ledger, moved: list[datetime]) -> None:
    found = nights(ledger, night="22:00-06:00")
    found.expect(at("27 12:00"))
    moved[0] = at("27 23:00")
    ledger.open_round({})
    assert found.due(at("28 09:00")) is None


def test_other_windows_are_expected_from_then_on(ledger: Ledger) -> None:
    nights(ledger, night="22:00-06:00").expect(at("20 12:00"))
    for _ in range(3):
        nights(ledger, night="22:00-06:00").expect(at("21 12:00"))
    later = nights(ledger, night="01:00-02:00")
    later.expect(at("27 12:00"))
    assert len(ledger.events()) == 2


def test_a_night_of_windows_that_were_not_set_yet_was_not_missed(ledger: Ledger, moved: list[datetime]) -> None:
    before, later = nights(ledger, night="21:00-06:00"), nights(ledger, night="02:00-05:00")
    before.expect(at("27 12:00"))
    run(before, at("27 21:00"))
    moved[0] = at("27 23:40")
    ledger.close_round(ledger.open_round({})[0], {})
    for now in ("28 10:00", "28 12:59"):
        later.expect(at(now))
        assert later.due(at(now)) is None, now
    assert run(later, at("29 02:00")).why == "the night"
    # the windows of before are set again: they count from then on, too
    before.expect(at("30 10:00"))
    assert before.due(at("30 10:00")) is None
    before.expect(at("30 20:00"))
    assert "missed" in run(before, at("30 21:00") + timedelta(hours=10)).why


def test_a_stop_holds_until_train_or_the_next_night(ledger: Ledger) -> None:
    found = nights(ledger, night="22:00-06:00")
    found.expect(at("27 12:00"))
    run(found, at("27 22:00"), None)
    found.note_stop("ann", at("27 23:00"))
    stop = found.held()
    assert stop is not None
    assert stop.details["by"] == "ann"
    for now in ("27 23:01", "28 05:00", "28 09:00"):
        assert found.due(at(now)) is None, now
    assert found.due(at("28 22:00")) is not None
    found.note_train("ben", at("28 09:00"))
    assert found.held() is None


def test_a_stop_by_day_does_not_stop_the_night(ledger: Ledger) -> None:
    found = nights(ledger, night="22:00-06:00", after_labels="1")
    found.expect(at("27 12:00"))
    found.note_stop(None, at("27 15:00"))
    assert found.due(at("27 16:00")) is None
    assert found.due(at("27 22:00")) is not None


def saved(ledger: Ledger, *cases: str, tag: str = "final") -> None:
    ledger.append([Entry("saved", case=case, tag=tag) for case in cases])


def test_new_labels_count_since_the_last_start(ledger: Ledger) -> None:
    found = nights(ledger, after_labels="2")
    now = at("27 12:00")
    saved(ledger, "a", "a", "a")
    saved(ledger, "b", tag="draft")
    assert found.due(now) is None, "one scan, saved three times"
    saved(ledger, "b")
    start = run(found, now)
    assert (start.why, start.until, start.labels) == ("2 new labels", None, 2)
    assert found.due(now) is None
    saved(ledger, "a", "c")
    ledger.open_round({})
    assert found.due(now) is None, "a round has read them"
    saved(ledger, "d", "e")
    found.note_stop("ann", now)
    assert found.due(now) is None
    saved(ledger, "f", "g")
    assert found.due(now) is None, "a stop holds, however many labels come"
    found.note_train("ann", now)
    assert found.due(now) is None, "what Train has started reads these labels"
    saved(ledger, "h", "i")
    assert found.due(now) is not None


def test_a_round_after_new_labels_that_was_killed_goes_on(ledger: Ledger) -> None:
    found = nights(ledger, after_labels="2")
    saved(ledger, "a", "b")
    start = run(found, at("27 12:00"), None)
    ledger.open_round({})
    saved(ledger, "c")
    again = run(found, at("27 12:10"), None)
    assert (again.night.key, again.until, again.labels) == (start.night.key, None, 2)
    run(found, at("27 12:20"), "round 1 is done")
    assert found.due(at("27 12:30")) is None
    saved(ledger, "d")
    # one label came while the round ran, before it was started again
    assert found.due(at("27 13:00")) is None
    saved(ledger, "e")
    for minute in range(MOST_STARTS):
        run(found, at(f"28 12:{minute:02}"), None)
    assert found.due(at("28 12:30")) is None, "a process that is killed each time is left alone"
    saved(ledger, "f", "g")
    run(found, at("28 13:00"), None)
    found.note_stop("ann", at("28 13:10"))
    assert found.due(at("28 13:20")) is None


def test_the_clock_is_moved_back(ledger: Ledger) -> None:
    found = nights(ledger, night="22:00-06:00")
    found.expect(at("20 12:00"))
    run(found, at("27 22:00"))
    # by some hours: the night that was is not again
    for now in ("27 21:30", "27 22:00", "26 23:00"):
        assert found.due(at(now)) is None, now
    assert found.due(at("28 22:00")) is not None
    # by months, to the right time: what was noted under the wrong one is passed over
    before = datetime(2026, 6, 1, 23, tzinfo=UTC)
    found.expect(before)
    assert found.due(before) is not None


def test_what_the_command_runs(ledger: Ledger) -> None:
    now = at("27 12:00")
    alone = nights(ledger, night_hours="2").commanded(now)
    assert isinstance(alone, Start)
    assert alone.until == at("27 14:00")
    scheduled = nights(ledger, night="22:00-06:00")
    scheduled.expect(now)
    assert scheduled.commanded(now) == "no round is due before 2026-11-27T22:00:00+00:00"
    assert isinstance(scheduled.commanded(at("27 22:00")), Start)
    run(scheduled, at("27 22:00"))
    assert scheduled.commanded(at("27 23:30")) == "this night has had its round"
    scheduled.note_stop("ann", at("28 22:30"))
    assert "stopped by ann" in str(scheduled.commanded(at("28 23:00")))
    assert nights(ledger, after_labels="3").commanded(at("29 12:00")) == (
        "stopped by ann at 2026-11-28T22:30:00+00:00; nothing starts before Train or a night"
    )


def test_people_are_told(ledger: Ledger) -> None:
    found = nights(ledger, night="22:00-06:00", after_labels="5")
    found.expect(at("27 12:00"))
    run(found, at("27 22:00"))
    found.note_stop("ann", at("28 12:00"))
    told: dict[str, Any] = found.state(at("28 12:00"))
    assert told["next"] == "2026-11-28T22:00:00+00:00"
    assert told["open"] is None
    assert told["held"]["by"] == "ann"
    assert told["last"]["outcome"] == "round 1 is done"
    assert told["after_labels"] == 5
    assert found.state(at("28 23:00"))["open"] == "2026-11-29T06:00:00+00:00"


def unchanged_round(ledger: Ledger) -> int:
    number, _ = ledger.open_round({})
    ledger.close_round(number, {"inputs": "i"})
    return number


@pytest.mark.parametrize("what", ["veto", "rolled back"])
def test_what_somebody_took_back_starts_rounds_again(ledger: Ledger, what: str) -> None:
    last = [unchanged_round(ledger) for _ in range(3)][-1]
    assert settled(ledger, "i")
    ledger.append([Entry(what, last if what == "rolled back" else None)])
    assert settled(ledger, "i") is None
    unchanged_round(ledger)
    assert settled(ledger, "i"), "the next round has left it out"
