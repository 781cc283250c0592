"""``aslseg report``: what a round did, as an HTML file and as a headline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aslseg.commands.options import Conf, Json, Studies, read_settings, show


def report(
    studies: Studies,
    number: Annotated[
        int | None, typer.Option("--round", help="Which round; by default the last one that ended.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; by default beside the ledger.")] = None,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Write the report of a round again, and print its headline."""
    settings = read_settings(conf)[0]
    from aslseg.review.report import headline, write
    from aslseg.settings import Paths

    path, content = write(Paths(settings, studies), settings, number, out)
    short = headline(content)
    if as_json:
        return show(short | {"file": str(path)}, True)
    for line in (short["text"], *content["warnings"]):
        typer.echo(line)
    if content["first"]:
        typer.echo(f"Look at these first: {', '.join(d['case'] for d in content['first'])}")
    typer.echo(f"Report: {path}")
