"""Options and small functions that commands share."""

from __future__ import annotations

import json
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
