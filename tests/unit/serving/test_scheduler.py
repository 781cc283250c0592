"""Of several servers on one folder one starts the rounds; a stop ends what runs and holds."""

from __future__ import annotations

import errno
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from monailabel.utils.async_tasks import utils as task_queues
from monailabel.utils.async_tasks.utils import run_background_task

import recorded_clicks
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.scheduling import brake, schedule
from aslseg.rounds.scheduling.brake import clicked
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.rounds.scheduling.nights import Nights
from aslseg.serving import scheduler
from aslseg.serving.scheduler import Scheduler, training_runs
from aslseg.settings import Paths, load_settings
from tiny_rounds import tiny_studies


class Machine:
    """A server's training task, as far as the schedule sees it."""

    def __init__(self, paths: Paths, conf: dict[str, str]) -> None:
        self.started: list[dict[str, Any]] = []
        self.runs = False
        settings, _ = load_settings(conf, env={})
        self.nights = Nights(Ledger(paths.ledger), settings)
        self.scheduler = Scheduler(paths, self.nights, self.start, lambda: self.runs, self.stop)

    def start(self, request: dict[str, Any]) -> None:
        self.started.append(request)
        self.runs = True

    def stop(self) -> None:
        self.runs = False


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    moment = [datetime(2026, 11, 27, 21, 59, tzinfo=UTC)]
    monkeypatch.setattr(schedule, "utc_now", lambda: moment[0])
    return moment


def servers(tmp_path: Path, count: int) -> tuple[Paths, list[Machine]]:
    (tmp_path / "studies").mkdir()
    conf = {"night": "22:00-06:00", "time_zone": "UTC"}
    paths = Paths(load_settings(conf, env={})[0], tmp_path / "studies")
    return paths, [Machine(paths, conf) for _ in range(count)]


def test_two_servers_on_one_folder_start_one_round(tmp_path: Path, now: list[datetime]) -> None:
    _, (one, two) = servers(tmp_path, 2)
    assert not one.scheduler.tick()
    assert not two.scheduler.tick()
    now[0] = datetime(2026, 11, 27, 22, tzinfo=UTC)
    assert not two.scheduler.tick(), "the first one has the schedule"
    assert one.scheduler.tick()
    assert one.started == [
        {"model": "round", "night": "2026-11-27T22:00:00+00:00", "until": "2026-11-28T06:00:00+00:00"}
    ]
    assert not one.scheduler.tick()
    # the first server is killed: its lock goes, and its round with it; the other one goes on with that
    one.scheduler.release()
    assert two.scheduler.tick()
    assert two.started == one.started
    two.nights.note_end("2026-11-27T22:00:00+00:00", "round 1 is done", now[0])
    two.stop()
    assert not two.scheduler.tick()


def test_a_round_from_a_terminal_is_waited_for(tmp_path: Path, now: list[datetime]) -> None:
    paths, (one,) = servers(tmp_path, 1)
    now[0] = datetime(2026, 11, 27, 22, tzinfo=UTC)
    with round_lock(paths.home):
        assert not one.scheduler.tick()
    assert one.scheduler.tick()


def test_a_stop_that_another_server_was_asked_for_ends_the_round_and_holds(tmp_path: Path, now: list[datetime]) -> None:
    _, (one, two) = servers(tmp_path, 2)
    now[0] = datetime(2026, 11, 27, 22, tzinfo=UTC)
    assert one.scheduler.tick()
    two.nights.note_stop("ann", now[0])
    assert not one.scheduler.tick()
    assert not one.runs
    now[0] = datetime(2026, 11, 28, 5, tzinfo=UTC)
    assert not one.scheduler.tick()
    now[0] = datetime(2026, 11, 28, 22, tzinfo=UTC)
    assert one.scheduler.tick()
    # Train after a stop: the schedule leaves it alone
    two.nights.note_stop("ann", now[0])
    two.nights.note_train("ben", now[0])
    assert not one.scheduler.tick()
    assert one.runs


def test_the_schedule_outlives_what_nobody_expects_and_says_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, (one,) = servers(tmp_path, 1)
    left, over = ["can't start new thread"] * 3 + ["disk full"] * 2, threading.Event()

    def fails() -> bool:
        if left:
            raise RuntimeError(left.pop(0))
        over.set()
        threading.Event().wait()  # for ever: the thread ends with the process
        return False

    monkeypatch.setattr(scheduler, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(one.scheduler, "tick", fails)
    one.scheduler.begin()
    assert over.wait(30)
    assert [str(r.exc_info[1]) for r in caplog.records if r.exc_info] == ["can't start new thread", "disk full"]


def test_a_training_whose_process_could_not_be_started_is_said_and_tried_again(
    tmp_path: Path, now: list[datetime], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    for name in ("background_tasks", "background_processes", "background_executors"):
        monkeypatch.setattr(task_queues, name, {})
    monkeypatch.setattr(task_queues.subprocess, "Popen", refused)
    monkeypatch.setenv("PYTHONPATH", "lib")
    paths, (one,) = servers(tmp_path, 1)
    now[0] = datetime(2026, 11, 27, 22, tzinfo=UTC)
    schedule_ = Scheduler(paths, one.nights, lambda r: run_background_task(r, "train"), training_runs, one.stop)
    assert schedule_.tick()
    task_queues.background_executors["train"].submit(int).result()  # after the one that failed
    assert not schedule_.tick(), "its process may start in a moment"
    assert "no process" not in caplog.text
    monkeypatch.setattr(scheduler, "WAITING_SECONDS", 0.0)
    assert schedule_.tick()
    task_queues.background_executors["train"].submit(int).result()
    assert [task["status"] for task in task_queues.tasks("train")] == ["ERROR", "SUBMITTED"]
    assert caplog.text.count("ulimit -u") == 1
    task_queues.background_processes["train"]["another"] = object()
    assert not schedule_.tick()


def test_the_first_round_respects_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aslseg.serving import app as serving

    started: list[dict[str, Any]] = []
    monkeypatch.setattr(serving.AsyncTask, "run", lambda method, request: started.append(request))
    served = recorded_clicks.app(
        tiny_studies(tmp_path, cases=2, labelled=1), tmp_path / "models", first_round="true", time_zone="UTC"
    )
    now = datetime(2026, 11, 27, 12, tzinfo=UTC)
    served.nights.note_stop("ann", now)
    served.start_first_round()
    served.on_save_label("phantom_001", "final")
    assert started == []
    served.nights.note_train("ann", now)
    served.on_save_label("phantom_001", "final")
    assert started == [{"model": "round"}]


def test_a_server_of_a_pacs_has_no_schedule_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = recorded_clicks.app(tiny_studies(tmp_path, cases=1, labelled=0), tmp_path / "models", night="22:00-06:00")
    served.paths.studies = None
    served._follow_schedule()
    assert "rounds need a local studies folder" in caplog.text


def test_what_is_asked_of_the_server_holds_a_round_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aslseg.serving import app as serving

    studies = tiny_studies(tmp_path, cases=1, labelled=0)
    served = recorded_clicks.app(studies, tmp_path / "models")
    assert not clicked(served.paths.home)
    served.infer({"model": "sam", "image": "phantom_000"})
    assert clicked(served.paths.home)
    # an answer that takes longer than a round waits after the last one
    monkeypatch.setattr(brake, "CLICK_SECONDS", 0.0)
    answer, held = serving.answer, []

    def slow(*arguments: Any) -> Any:
        held.append(clicked(served.paths.home))
        return answer(*arguments)

    monkeypatch.setattr(serving, "answer", slow)
    served.infer({"model": "sam", "image": "phantom_000"})
    assert held == [True]
    assert not clicked(served.paths.home)
