"""``aslseg doctor``: what is wrong with this installation and its studies, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aslseg.commands.options import Conf, Json, read_settings, show
from aslseg.errors import BadSettingsError

if TYPE_CHECKING:
    from aslseg.settings import Settings


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        level: ``error``: something does not work, or would be lost; ``warning``: somebody should look at it.
        about: What it is about, in a word.
        text: What is wrong.
        remedy: What to do.
    """

    level: Literal["error", "warning"]
    about: str
    text: str
    remedy: str

    def line(self) -> str:
        """In one line."""
        return " ".join(f"{self.level}: {self.about}: {self.text.rstrip('.')}. {self.remedy}".split())


def doctor(
    studies: Annotated[str | None, typer.Option(help="Studies folder or DICOMweb address.")] = None,
    read_all: Annotated[bool, typer.Option(help="Read the voxels of every scan, not only the headers.")] = False,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong with this installation and its studies, and how to mend it; exit code 1 if anything is."""
    findings = list(_examine(studies, read_all, conf))
    if as_json:
        show({"ok": not findings, "findings": [asdict(f) for f in findings]}, True)
    for finding in () if as_json else findings:
        typer.echo(finding.line())
    if not findings and not as_json:
        typer.echo("nothing wrong was found")
    if any(f.level == "error" for f in findings):
        raise typer.Exit(1)


def _examine(studies: str | None, read_all: bool, conf: list[str] | None) -> Iterator[Finding]:
    from aslseg.commands import examine_installation, examine_studies
    from aslseg.settings import Paths

    yield from examine_installation.packages()
    try:
        settings: Settings = read_settings(conf)[0]
    except BadSettingsError as error:
        yield Finding("error", "settings", str(error), "`aslseg info` shows where each value comes from.")
        return
    yield from examine_installation.machine(settings)
    yield from examine_installation.access(settings)
    yield from examine_installation.pretrained(settings)
    if studies is None:
        return
    paths = Paths(settings, studies)
    yield from examine_installation.folders(settings, [p for p in (paths.studies, paths.home, paths.models) if p])
    if paths.studies is None:
        yield from examine_studies.pacs(studies)
    else:
        yield from examine_studies.scans(paths.studies, settings, read_all)
        yield from examine_studies.kept_files(paths.studies, paths)
        yield from examine_studies.state(paths.studies, paths)
    yield from examine_studies.models(paths, settings)
