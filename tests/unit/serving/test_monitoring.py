"""Health, metrics, and MONAI Label's coroutines in threads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from aslseg.files import write_json
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.scheduling.nights import Nights
from aslseg.rounds.scheduling.schedule import utc_now
from aslseg.serving.health import check_health
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.metrics import Metrics, RequestTimer, watch_studies
from aslseg.serving.routes import put_in_front
from aslseg.serving.routes.datastore import add_routes
from aslseg.serving.threads import without_loop
from aslseg.settings import Paths, load_settings


def health(studies: Path, store: Any = None, **conf: str) -> dict[str, Any]:
    settings = load_settings({"min_free_gb": "0", **conf}, env={})[0]
    return check_health(Paths(settings, studies), settings, store or SimpleNamespace())


def test_health(tmp_path: Path) -> None:
    (tmp_path / ".aslseg").mkdir()
    assert health(tmp_path)["status"] == "ok"
    full = health(tmp_path, min_free_gb="1e9")
    assert full["status"] == "failing"
    assert "Free some space" in full["checks"]["disk"]
    (tmp_path / ".aslseg" / "ledger.sqlite").write_bytes(b"damaged" * 1000)
    assert "ledger.sqlite" in health(tmp_path)["checks"]["ledger"]


def test_health_names_a_ledger_that_was_deleted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / ".aslseg" / "ledger.sqlite")
    ledger.append([Entry("note")])
    assert health(tmp_path)["status"] == "ok"
    for path in ledger.path.parent.glob("ledger.sqlite*"):
        path.unlink()
    assert "the file is gone; it had 1 events" in health(tmp_path)["checks"]["ledger"]


def test_health_names_a_lock_and_a_recovery(tmp_path: Path) -> None:
    (tmp_path / ".aslseg").mkdir()

    def locked() -> None:
        raise RefusedError("locked by process 1", 503)

    found = health(tmp_path, SimpleNamespace(require_unlocked=locked, recovered="from its backup"))
    assert (found["status"], found["checks"]["lock"]) == ("failing", "locked by process 1")
    assert found["recovered"] == "from its backup"


def test_a_studies_folder_that_has_gone(tmp_path: Path) -> None:
    assert "is not there" in health(tmp_path / "gone")["checks"]["studies"]


def test_requests_are_measured_by_route() -> None:
    metrics, host = Metrics(), FastAPI()
    host.user_middleware.append(Middleware(RequestTimer, metrics=metrics))

    @host.get("/scans/{case}")
    def scan(case: str) -> str:
        if case == "bad":
            raise ValueError(case)
        return case

    client = TestClient(host, raise_server_exceptions=False)
    for path in ("/scans/Mueller_Anna", "/scans/Maier", "/scans/bad", "/nowhere/Mueller_Anna"):
        client.get(path)
    metrics.observe_stages("aslseg", {"ssl": 0.2, "write": 0.01})
    metrics.watch("aslseg_cache_bytes", "Bytes", {"scans": lambda: 7.0}, "cache")
    text = metrics.render().decode()
    assert 'aslseg_request_seconds_count{method="GET",route="/scans/{case}",status="200"} 2.0' in text
    assert 'aslseg_request_seconds_count{method="GET",route="/scans/{case}",status="500"} 1.0' in text
    assert 'aslseg_request_seconds_count{method="GET",route="none",status="404"} 1.0' in text
    assert 'aslseg_stage_seconds_sum{model="aslseg",stage="ssl"} 0.2' in text
    assert 'aslseg_cache_bytes{cache="scans"} 7.0' in text
    assert "aslseg_requests_in_flight 0.0" in text
    assert "process_resident_memory_bytes" in text
    assert "Mueller" not in text


def test_methods_that_clients_invent_make_no_series() -> None:
    metrics, host = Metrics(), FastAPI()
    host.user_middleware.append(Middleware(RequestTimer, metrics=metrics))
    client = TestClient(host)
    for number in range(3):
        client.request(f"Q{number}", "/scans")
    text = metrics.render().decode()
    assert 'aslseg_request_seconds_count{method="other",route="none",status="404"} 3.0' in text
    assert 'method="Q' not in text


def test_no_route_of_monai_label_runs_on_the_event_loop() -> None:
    """Also in the versions of FastAPI that keep an included router as one route."""
    host, seen, inner, outer = FastAPI(), {}, APIRouter(prefix="/info"), APIRouter()

    def user() -> str:
        return "nobody"

    async def loop() -> None:
        seen["loop"] = threading.current_thread()

    @inner.get("/")
    async def blocking(number: int = 1, who: str = Depends(user)) -> str:
        seen["/info/"] = threading.current_thread()
        return f"{who} {number}"

    @host.get("/reload")
    def plain() -> None:
        seen["/reload"] = threading.current_thread()

    @host.get("/own")
    async def theirs() -> str:
        return "theirs"

    @outer.get("/own")
    def own(_: None = Depends(loop)) -> str:
        return "ours"

    @outer.get("/docs")
    def docs() -> str:
        return "ours"

    middle = APIRouter(prefix="/api")
    middle.include_router(inner)
    host.include_router(middle, prefix="/v1")
    host.dependency_overrides[user] = lambda: "ann"
    put_in_front(host, outer)
    with TestClient(host) as client:
        assert client.get("/own").json() == "ours"
        assert client.get("/docs").json() == "ours"
        assert client.get("/v1/api/info/?number=5").json() == "ann 5"
        assert client.get("/v1/api/info/?number=five").status_code == 422
        assert client.get("/reload").status_code == 200
        assert client.get("/openapi.json").status_code == 200
    assert seen["loop"] not in (seen["/info/"], seen["/reload"])


def test_a_coroutine_that_waits_is_no_plain_function() -> None:
    class Wait:
        def __await__(self) -> Any:
            yield

    async def waits() -> None:
        await Wait()

    with pytest.raises(RuntimeError, match="waits on the event loop"):
        without_loop(waits)()


def test_the_round_and_the_scans_are_measured(tmp_path: Path) -> None:
    paths, metrics = Paths(load_settings({}, env={})[0], tmp_path), Metrics()
    store = SimpleNamespace(status=lambda: {"total": 7, "completed": 3, "label_tags": {}})
    watch_studies(metrics, paths, store)  # type: ignore[arg-type]
    assert 'aslseg_round{value="running"} 0.0' in metrics.render().decode(), "no round yet"
    write_json(paths.home / "progress.json", {"state": "done", "round": 4, "part": 0.5})
    text = metrics.render().decode()
    assert 'aslseg_cases{kind="completed"} 3.0' in text
    assert 'aslseg_tasks_running{queue="train"} 0.0' in text
    assert 'aslseg_round{value="number"} 4.0' in text
    assert 'aslseg_round{value="fraction"} 0.5' in text


def test_a_round_or_a_night_that_failed_is_measured(tmp_path: Path) -> None:
    paths, metrics = Paths(load_settings({}, env={})[0], tmp_path), Metrics()
    store = SimpleNamespace(status=lambda: {"total": 1, "completed": 0})
    watch_studies(metrics, paths, store)  # type: ignore[arg-type]
    nights, now = Nights(Ledger(paths.ledger), load_settings({"night": "22:00-06:00"}, env={})[0]), utc_now()

    def failed() -> str:
        found = [line for line in metrics.render().decode().splitlines() if 'aslseg_round{value="failed"}' in line]
        return found[0].split()[-1]

    assert failed() == "0.0", "nothing has happened yet"
    nights.note_end("2026-11-27T22:00:00+00:00", "failed: disk full", now)
    assert failed() == "1.0"
    nights.expect(now)
    assert failed() == "1.0", "an expectation is no success"
    write_json(paths.home / "progress.json", {"state": "running", "pid": os.getpid()})
    assert failed() == "0.0"
    write_json(paths.home / "progress.json", {"state": "done"})
    nights.ledger.close_round(nights.ledger.open_round({})[0], {})
    assert failed() == "0.0"
    nights.note_end("2026-11-28T22:00:00+00:00", "failed: disk full", now)
    nights.note_end("2026-11-29T22:00:00+00:00", "settled: nothing new", now)
    assert failed() == "0.0"
    write_json(paths.home / "progress.json", {"state": "failed"})
    assert failed() == "0.0", "of a command that a person has stopped"
    nights.ledger.append([Entry("failed", 2, details={"error": "disk full"})])
    assert failed() == "1.0", "of a round that no night has started"


def test_a_studies_disk_that_is_away_hides_no_other_measurement(tmp_path: Path) -> None:
    def away() -> dict[str, int]:
        raise RefusedError("the studies folder is not there", 503)

    metrics = Metrics()
    watch_studies(metrics, Paths(load_settings({}, env={})[0], tmp_path), SimpleNamespace(status=away))  # type: ignore[arg-type]
    text = metrics.render().decode()
    assert 'aslseg_cases{kind="total"} NaN' in text
    assert "aslseg_requests_in_flight 0.0" in text


def test_what_follows_a_saved_label_keeps_its_sender_waiting_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    clock = [1.0]

    def follow(case: str, label: str) -> None:
        order.append(f"followed by the rest for {case}")
        clock[0] += 1000

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        async def noted(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                order.append("answered")

        await host(scope, receive, noted)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    store = SimpleNamespace(save_label=lambda *_: order.append("saved") or "case0")
    app = SimpleNamespace(
        datastore=lambda: store,
        leases=SimpleNamespace(release=lambda case: order.append(f"released {case}")),
        on_save_label=follow,
    )
    metrics, host, router = Metrics(), FastAPI(), APIRouter()
    add_routes(router, app)  # type: ignore[arg-type]
    host.include_router(router)
    host.user_middleware.append(Middleware(RequestTimer, metrics=metrics))
    reply = TestClient(noting).put("/datastore/label?image=case0", files={"label": ("label.nii.gz", b"x")})
    assert reply.json() == {"image": "case0", "label": "case0"}
    assert order == ["saved", "released case0", "answered", "followed by the rest for case0"]
    text = metrics.render().decode()
    assert 'aslseg_request_seconds_sum{method="PUT",route="/datastore/label",status="200"} 0.0' in text
