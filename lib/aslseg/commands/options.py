"""Options and small functions that commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aslseg import console

if TYPE_CHECKING:
    from aslseg.settings import Settings

Conf = Annotated[
    list[str] | None,
    typer.Option("--conf", metavar="KEY VALUE", help="A setting, as for monailabel; KEY=VALUE works too. Repeatable."),
]
Studies = Annotated[
    Path,
    typer.Option(
        "--studies",
        parser=console.studies_folder,
        metavar="FOLDER",
        help="Folder with the scans (MONAI Label studies folder).",
    ),
]
LOCAL: dict[str, Any] = {"parser": console.local_path, "metavar": "PATH"}
"""For options and arguments that are files or folders on this machine."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_settings(conf: list[str] | None) -> tuple[Settings, dict[str, str]]:
    """The settings, and for each of them where its value came from.

    Raises:
        BadSettingsError: An unknown setting or a value that cannot be used.
    """
    from aslseg.settings import load_settings

    return load_settings(console.conf_pairs(conf))


def show(content: Any, as_json: bool) -> None:
    """Print a result as JSON, or as lines of text."""
    for line in [json.dumps(content, indent=2, default=str)] if as_json else console.lines(content):
        typer.echo(line)


def ready(conf: list[str] | None) -> Settings:
    """The settings; sets the environment variables that torch's threads read when they start."""
    settings = read_settings(conf)[0]
    # OpenMP threads that spin while they wait starve each other as soon as two processes share a machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    return settings


def require_no_round(studies: Path, settings: Settings) -> None:
    """Refuse before torch is imported, which takes seconds. The round takes the lock again by itself."""
    from aslseg.rounds.scheduling.lock import round_lock
    from aslseg.settings import Paths

    if "LOCAL_RANK" not in os.environ and studies.is_dir():
        with round_lock(Paths(settings, studies).home):
            pass


@contextmanager
def leading(settings: Settings) -> Iterator[bool]:
    """Whether this process does the work; the other processes that torchrun started train with it until it is done."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield True
        return
    from aslseg.ssl import distributed, worker

    distributed.init(settings)
    if distributed.rank() > 0:
        worker.help_train()
        yield False
        return
    yield True
    # not after an error: torchrun then ends the other processes, which may be in the middle of a step
    worker.stop_workers()
