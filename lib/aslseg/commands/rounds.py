"""``aslseg round`` and ``aslseg nightly``: rounds from a terminal, from cron and from systemd."""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aslseg import console
from aslseg.commands.options import Conf, Json, Studies, leading, read_settings, ready, require_no_round, show
from aslseg.errors import BadSettingsError, OutOfTimeError

if TYPE_CHECKING:
    from aslseg.settings import Settings


def round_(
    studies: Studies,
    rounds: Annotated[int, typer.Option(min=1, help="How many, one after the other.")] = 1,
    until: Annotated[
        str, typer.Option(metavar="HH:MM", help="End at this time of day; the next call goes on from there.")
    ] = "",
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Run a round: train, predict, rank, promote, retrain, publish. Continues an interrupted one where it stopped."""
    settings = ready(conf)
    ends = _next_time(until, settings) if until else None
    if ends is not None:
        _require_one_process("--until")
    require_no_round(studies, settings)
    from aslseg.rounds.run import run_round
    from aslseg.rounds.scheduling.brake import RoundBrake
    from aslseg.settings import Paths

    summaries: list[dict[str, Any]] = []
    brake = RoundBrake(Paths(settings, studies).home, ends)
    with leading(settings) as leads:
        for _ in range(rounds if leads else 0):
            try:
                with console.progress() as report:
                    summaries.append(run_round(studies, settings, report, brake=brake))
            except OutOfTimeError as error:
                summaries.append({"ended": str(error)})
            if not as_json:
                show(_brief(summaries[-1]), False)
            if "ended" in summaries[-1]:
                break
    if leads and as_json:
        show(summaries[0] if rounds == 1 else summaries, True)


def nightly(studies: Studies, conf: Conf = None, as_json: Json = False) -> None:
    """Do what the schedule asks for now, once: for cron or systemd, beside or in place of the server's own schedule."""
    settings = read_settings(conf)[0]
    _require_one_process("aslseg nightly")
    from aslseg.rounds.ledger.ledger import Ledger
    from aslseg.rounds.scheduling.lock import round_runs
    from aslseg.rounds.scheduling.nights import Nights
    from aslseg.rounds.scheduling.schedule import utc_now
    from aslseg.settings import Paths

    paths = Paths(settings, studies)
    if round_runs(paths.home):
        return show({"ended": "a round is already running; nothing to do"}, as_json)
    nights, now = Nights(Ledger(paths.ledger), settings), utc_now()
    nights.expect(now)  # so that a timer makes up for a night in which the machine was off
    due = nights.commanded(now)
    if isinstance(due, str):
        return show({"ended": due}, as_json)
    nights.note_start(due, now)
    ready(conf)
    from aslseg.rounds.nightly import run_night
    from aslseg.rounds.scheduling.brake import RoundBrake

    with console.progress() as report:
        summary = run_night(studies, settings, report, night=due.night.key, brake=RoundBrake(paths.home, due.until))
    show(summary if as_json else _brief(summary), as_json)


def _require_one_process(what: str) -> None:
    """The other processes of torchrun would wait for ever for the one that has ended its training."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadSettingsError(f"{what} works in one process only; leave torchrun out")


def _brief(summary: dict[str, Any]) -> dict[str, Any]:
    return summary if "ended" in summary else console.brief(summary)


def _next_time(text: str, settings: Settings) -> datetime:
    """The next moment at which clocks show this time of day."""
    from aslseg.rounds.scheduling.schedule import Schedule, utc_now, zone_of
    from aslseg.settings.windows import Window

    try:
        window = Window.parse(f"00:00-{text}" if text != "00:00" else "00:00-24:00")
    except ValueError as error:
        raise BadSettingsError(f"--until {text}: expected a time of day such as 06:00") from error
    schedule, now = Schedule((window,), zone_of(settings)), utc_now()
    night = schedule.open_at(now) or schedule.next_after(now)
    assert night is not None  # noqa: S101 - a window of every day opens within a week
    return night.closes
