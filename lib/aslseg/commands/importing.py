"""``aslseg import``: shows what was found, asks what is in doubt, and says what became of every scan."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aslseg import console
from aslseg.commands.options import LOCAL
from aslseg.errors import BadSettingsError

if TYPE_CHECKING:
    from aslseg.cases.importing.pairs import Pair
    from aslseg.cases.importing.plan import Options, Plan
    from aslseg.cases.importing.transfer import Done
    from aslseg.cases.importing.values import Question
    from aslseg.settings import Paths, Settings
    from aslseg.types import ProgressCallback

ROWS = 12


def import_folder(
    source: Annotated[
        Path,
        typer.Argument(help="Folder that holds the scans, in any known layout.", **LOCAL | {"metavar": "SRC"}),
    ],
    studies: Annotated[str, typer.Argument(metavar="DST", help="Studies folder; made if it is missing.")],
    link: Annotated[
        bool, typer.Option("--link/--copy", help="Link to scans that need no conversion, or copy them.")
    ] = False,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="VALUE=LABEL", help="What a value or a name stands for; 0: left out. Repeatable."
        ),
    ] = None,
    only: Annotated[str, typer.Option(metavar="GLOB", help="Scans to take, such as '*_0000.*' or '*_T1w*'.")] = "",
    labels: Annotated[str, typer.Option(metavar="GLOB", help="Label files to take.")] = "",
    layout: Annotated[str, typer.Option(help="Name of the layout, where it is taken for another.")] = "",
    keep_ids: Annotated[bool, typer.Option("--keep-ids", help="Keep the PatientID of DICOM, not a pseudonym.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; refuse where something is in doubt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and ask nothing.")] = False,
    conf: Annotated[
        list[str] | None, typer.Option("--conf", metavar="KEY VALUE", help="A setting. Repeatable.")
    ] = None,
) -> None:
    """Bring scans and labels of another layout (MSD, LiTS, nnU-Net, BIDS, DICOM, ...) into a studies folder."""
    from aslseg.cases.importing.plan import Options
    from aslseg.cases.importing.transfer import transfer
    from aslseg.settings import Paths, load_settings

    settings = load_settings(console.conf_pairs(conf))[0]
    options = Options(layout, only, labels, tuple(mapping or ()), keep_ids, link)
    paths = Paths(settings, studies)
    asks = not yes and not as_json and sys.stdin.isatty()
    plan = _decided(source, paths, options, settings, asks)
    assert paths.studies is not None  # noqa: S101 - make_plan refuses an address
    if not as_json:
        _show_plan(plan, paths.studies, settings)
    if asks and not typer.confirm(f"Import {_scans(len(plan.pairs))} into {paths.studies}?", err=True):
        raise typer.Exit(1)
    with _progress() as report:
        done = transfer(plan, paths.studies, settings, link, report)
    if as_json:
        typer.echo(json.dumps(_summary(plan, paths.studies, done), indent=2))
    else:
        _show_done(done)
    if any("failed" in (d.scan, d.label) for d in done):
        raise typer.Exit(1)


def _decided(source: Path, paths: Paths, options: Options, settings: Settings, asks: bool) -> Plan:
    """A plan without open questions."""
    from aslseg.cases.importing.plan import make_plan

    while True:
        with _progress() as report:
            plan = make_plan(source, paths, options, settings, report)
        if not plan.questions:
            return plan
        if not asks:
            listed = "".join(f"\n  {question}" for question in plan.questions)
            raise BadSettingsError(f"{source}: read as {plan.layout}; nothing was written, because of doubts:{listed}")
        typer.echo(f"{source}: read as {plan.layout}", err=True)
        for question in plan.questions:
            options = _asked(question, options, settings)


def _asked(question: Question, options: Options, settings: Settings) -> Options:
    """The options with the answer to a question."""
    from aslseg.cases.importing.values import parse_map

    typer.echo(f"{question.text}. An answer: {question.example}", err=True)
    while True:
        answer = typer.prompt(f"{question.option} {question.answer}", prompt_suffix="", err=True)
        answered = options.answered(question, answer.strip().strip("'\""))
        try:
            parse_map(answered.mapping, settings.label_set)
        except BadSettingsError as error:
            typer.echo(error, err=True)
            continue
        return answered


def _show_plan(plan: Plan, studies: Path, settings: Settings) -> None:
    title = f"{plan.source}: {plan.layout}"
    rows = [(p.case, _scan(p, plan.source), _label(p, plan.source), p.patient or "-") for p in plan.pairs]
    if console.on_terminal(sys.stdout):
        console.print_table(title, ("case", "scan", "label", "patient"), rows[:ROWS])
    else:
        typer.echo("\n".join([title, *("  ".join(row) for row in rows[:ROWS])]))
    if len(rows) > ROWS:
        typer.echo(f"and {len(rows) - ROWS} more")
    labelled = sum(bool(pair.labels) for pair in plan.pairs)
    typer.echo(f"{_scans(len(rows))}, {labelled} of them labelled, to {studies}")
    if labelled:
        typer.echo(f"labels: {_meaning(plan, settings)}")
    for reason in plan.passed_over:
        typer.echo(f"passed over: {reason}")


def _scans(count: int) -> str:
    return "1 scan" if count == 1 else f"{count} scans"


def _scan(pair: Pair, source: Path) -> str:
    if isinstance(pair.scan, Path):
        return pair.scan.relative_to(source).as_posix()
    return f"{len(pair.scan.slices)} {pair.scan.modality} images, {pair.scan.description or 'no description'}"


def _label(pair: Pair, source: Path) -> str:
    return ", ".join(label.path.relative_to(source).as_posix() for label in pair.labels) or "-"


def _meaning(plan: Plan, settings: Settings) -> str:
    names = {value: name for name, value in settings.label_set.values.items()} | {0: "left out"}
    values = [f"{file} = {names[value]}" for file, value in plan.meaning.values.items() if file]
    files = [f"{file} = {names[value]}" for file, value in plan.meaning.names.items()]
    return ", ".join(values + files) or "only background"


def _show_done(done: Sequence[Done]) -> None:
    scans, labels = Counter(d.scan for d in done), Counter(d.label for d in done)
    for d in done:
        for note in d.notes:
            typer.echo(f"{d.case}: {note}")
    if scans["unchanged"] == len(done) and not labels["written"] + labels["failed"]:
        typer.echo(f"nothing to do: {_scans(len(done))} found, and there already")
        return
    typer.echo(f"scans: {_counts(scans)}")
    typer.echo(f"labels: {_counts(labels)}")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items()))


def _summary(plan: Plan, studies: Path, done: Sequence[Done]) -> dict[str, Any]:
    return {
        "source": str(plan.source),
        "studies": str(studies),
        "layout": plan.layout,
        "cases": [asdict(d) | {"patient": pair.patient} for d, pair in zip(done, plan.pairs, strict=True)],
        "passed_over": plan.passed_over,
    }


def _progress() -> AbstractContextManager[ProgressCallback]:
    return console.progress()
