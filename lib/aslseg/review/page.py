"""The status page, rendered on the server without scripts and without files from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from aslseg.review.status import collect
from aslseg.settings import Paths, Settings

REFRESH_RUNNING, REFRESH_IDLE = 5, 30


@cache
def template(name: str) -> Template:
    """A template of this folder; everything that is put into it is escaped."""
    environment = Environment(
        loader=PackageLoader("aslseg", "review/templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"duration": duration, "number": number, "moment": moment, "by_label": by_label}
    return environment.get_template(name)


def render(status: dict[str, Any]) -> str:
    """The status from :func:`aslseg.review.status.collect` as HTML."""
    running = status["progress"].get("state") == "running"
    return template("status.html").render(**status, refresh=REFRESH_RUNNING if running else REFRESH_IDLE)


def prepare(settings: Settings, paths: Paths) -> None:
    """Read what the next page shows, and translate its template: of thousands of scans that takes a second or two."""
    render(collect(settings, paths, {"total": 0, "completed": 0, "label_tags": {}}))


def duration(seconds: float | None) -> str:
    """Seconds as text: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds is None:
        return "unknown"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def number(value: object) -> str:
    """Four significant digits of a number; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def by_label(values: Mapping[str, float | None]) -> str:
    """A number of each label; ``empty`` where no mask holds the label."""
    return ", ".join(f"{name} {'empty' if value is None else f'{value:.3f}'}" for name, value in values.items())


def moment(time: str | None) -> str:
    """An ISO time in UTC to the minute, ``2026-11-21 12:00 UTC``; empty without one."""
    return f"{time[:10]} {time[11:16]} UTC" if time else ""
