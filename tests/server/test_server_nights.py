"""A server that nobody touches: two nights by itself, and a stop that holds, with a clock that the test moves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from aslseg.files import atomic_file
from aslseg.rounds.ledger.ledger import Event, Ledger
from tiny_rounds import tiny_settings, tiny_studies

MOVED = Path(__file__).parents[1] / "moved_clock"
SECONDS = 300


def wait_for(what: Callable[[], Any], server: Any) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < end, server.log[-4000:]
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_two_nights_by_itself_and_a_stop_that_holds(serve: Callable[..., Any], tmp_path: Path) -> None:
    studies = tiny_studies(tmp_path, cases=3, labelled=2)
    clock, today = tmp_path / "ahead", datetime.now(UTC)

    def set_clock(day: int, hour: int) -> None:
        """So many days from today."""
        wanted = today.replace(hour=hour, minute=0, second=0) + timedelta(days=day)
        with atomic_file(clock) as temporary:
            temporary.write_text(str((wanted - datetime.now(UTC)).total_seconds()))

    set_clock(1, 12)
    env = {"MOVED_CLOCK": str(clock), "PYTHONPATH": os.pathsep.join([str(MOVED), os.environ.get("PYTHONPATH", "")])}
    settings = tiny_settings(tmp_path, night="22:00-06:00", time_zone="UTC", first_round=False)
    server = serve(studies, env=env, **settings.model_dump(include=settings.model_fields_set)).wait()
    ledger = Ledger(studies / ".aslseg" / "ledger.sqlite")

    def noted(kind: str) -> list[Event]:
        return [e for e in ledger.events(kinds=(kind,)) if e.details.get("outcome") != "scheduled"]

    # the first night starts a round, and somebody stops it
    set_clock(1, 22)
    wait_for(lambda: requests.get(f"{server.url}/train/?check_if_running=true", timeout=60).ok, server)
    assert len(noted("started")) == 1
    assert requests.delete(f"{server.url}/train/", timeout=60).json()["status"] == "STOPPED"
    set_clock(2, 3)
    time.sleep(2)  # six looks at the schedule
    assert len(noted("started")) == 1
    assert noted("stopped")[0].details["by"] == "a client"
    assert "Stopped by a client" in requests.get(f"{server.url}/aslseg/", timeout=60).text

    # the stop ends with the next night, in which the round goes on to its end, and by day nothing starts
    set_clock(2, 22)
    wait_for(lambda: noted("night"), server)
    set_clock(3, 12)
    time.sleep(2)
    assert [e.details["outcome"] for e in noted("night")] == ["round 1 is done"]
    set_clock(3, 22)
    wait_for(lambda: len(noted("night")) == 2, server)
    assert [e.details["outcome"] for e in noted("night")] == ["round 1 is done", "round 2 is done"]
    assert [e.details["by"] for e in noted("started")] == ["schedule"] * 3
    assert [r.state for r in ledger.rounds()] == ["done", "done"]
    page = requests.get(f"{server.url}/aslseg/", timeout=60).text
    assert "round 2 is done" in page
    assert "Stopped by" not in page
    server.stop()
