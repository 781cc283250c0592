"""Measurements of the running server in Prometheus' format: requests, stages, queues, caches, the round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.utils.async_tasks.utils import processes
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aslseg.errors import AslsegError
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.scheduling.nights import last_failed
from aslseg.rounds.scheduling.progress import read_progress
from aslseg.settings import Paths

CONTENT_TYPE = CONTENT_TYPE_LATEST
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100, 300)


class Metrics:
    """The measurements of one server. No label names a scan or a person.

    Attributes:
        requests: Seconds of each answered request, by route, method and status.
        stages: Seconds of each stage of an inference (``pre``, ``ssl``, ``sam``, ``adapter``, ``write`` ...), by model.
        in_flight: Requests that are being answered.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "aslseg_request_seconds",
            "Time to answer a request",
            ["method", "route", "status"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "aslseg_stage_seconds",
            "Time of a stage of an inference",
            ["model", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("aslseg_requests_in_flight", "Requests being answered", registry=self.registry)
        ProcessCollector(registry=self.registry)

    def observe_stages(self, model: str, latencies: Mapping[str, float]) -> None:
        """Record the seconds that an inference spent in each stage."""
        for stage, seconds in latencies.items():
            self.stages.labels(model, stage).observe(seconds)

    def watch(self, name: str, description: str, values: Mapping[str, Callable[[], float]], label: str) -> None:
        """Add a gauge that is read whenever somebody asks; NaN while its number cannot be had.

        Args:
            name, description: Of the gauge.
            values: Label value to a function that gives the number.
            label: Name of the label.
        """
        gauge = Gauge(name, description, [label], registry=self.registry)
        for value, function in values.items():
            gauge.labels(value).set_function(partial(_number, function))

    def render(self) -> bytes:
        """All measurements as text."""
        return generate_latest(self.registry)


def _number(function: Callable[[], float]) -> float:
    try:
        return function()
    except (AslsegError, OSError):  # a disk that is away hides no other measurement
        return math.nan


def watch_studies(metrics: Metrics, paths: Paths, store: Datastore) -> None:
    """Add the gauges of one studies folder: its scans, the running tasks, and the round."""
    cases = {name: lambda name=name: float(store.status()[name]) for name in ("total", "completed")}
    metrics.watch("aslseg_cases", "Scans, and those with a human label", cases, "kind")
    tasks = {kind: lambda kind=kind: len(processes(kind)) for kind in ("train", "scoring", "batch_infer")}
    metrics.watch("aslseg_tasks_running", "Processes of MONAI Label's task queues", tasks, "queue")

    def progress(key: str) -> float:
        return float(read_progress(paths.home / "progress.json").get(key) or 0)

    def running() -> float:
        return float(read_progress(paths.home / "progress.json")["state"] == "running")

    def failed() -> float:
        return float(not running() and last_failed(ledger))

    ledger = Ledger(paths.ledger)
    round_now = {"number": lambda: progress("round"), "fraction": lambda: progress("part")}
    round_now |= {"running": running, "failed": failed}
    text = "Number of the last round, the fraction of it that is done, whether it runs, and whether the last one failed"
    metrics.watch("aslseg_round", text, round_now, "value")


class RequestTimer:
    """ASGI middleware that measures requests by the route that answered, so that the number of series is bounded.

    A client may name any method, and need not log in for that: what is none of :data:`METHODS` counts as ``other``.

    Args:
        app: What follows.
        metrics: Where the measurements go.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and measure it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, ended = time.perf_counter(), "500", 0.0

        async def noting(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)
            ended = time.perf_counter()  # what is done after the answer keeps nobody waiting

        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, noting)
            finally:
                route: Any = scope.get("route")
                method = scope["method"] if scope["method"] in METHODS else "other"
                labels = method, getattr(route, "path", "none"), status
                self.metrics.requests.labels(*labels).observe((ended or time.perf_counter()) - began)
