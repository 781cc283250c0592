"""``aslseg ledger``: the decisions of rounds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aslseg import console
from aslseg.commands.options import Conf, Json, Studies, read_settings, show

if TYPE_CHECKING:
    from aslseg.settings import Paths, Settings

ledger_app = typer.Typer(no_args_is_help=True, help="The decisions of rounds: list them, check them, undo them.")


@ledger_app.command("list")
def ledger_list(studies: Studies, conf: Conf = None, as_json: Json = False) -> None:
    """List rounds and promotions, with their current state, what was promised, and why a round promoted nothing."""
    from dataclasses import asdict

    from aslseg.rounds.ledger.audits import promises_by_round
    from aslseg.rounds.promotion.decisions import why_nothing

    ledger = _ledger(studies, conf)
    rounds, promotions = ledger.rounds(), ledger.promotions(active_only=False)
    if as_json:
        return show({"rounds": [asdict(r) for r in rounds], "promotions": [asdict(p) for p in promotions]}, True)
    scores = ledger.scores()
    reasons = {r.number: why_nothing(r, scores) for r in rounds}
    promises = promises_by_round(ledger, rounds)
    if console.on_terminal(sys.stdout) and rounds:
        return console.print_ledger(rounds, promotions, reasons, promises)
    for line in console.ledger_lines(rounds, promotions, reasons, promises):
        typer.echo(line)


@ledger_app.command("rollback")
def ledger_rollback(
    studies: Studies,
    number: Annotated[int | None, typer.Option("--round", help="Undo this round and all later ones.")] = None,
    model: Annotated[str | None, typer.Option(help="Serve the model before: ssl, sam or adapter.")] = None,
    case: Annotated[str | None, typer.Option(help="Take back the promoted mask of this scan.")] = None,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Take back a round, a model or a promoted mask; human labels stay. What is taken back does not come again."""
    if sum(given is not None for given in (number, model, case)) != 1:
        raise typer.BadParameter("give one of --round N, --model KIND and --case SCAN")
    settings = read_settings(conf)[0]
    from aslseg.commands.examine_studies import models, why_not_loaded
    from aslseg.rounds.label_files import rollback
    from aslseg.settings import Paths

    paths = Paths(settings, studies)
    if number is not None:
        lines = rollback.roll_back(paths, number)
        lines += [found.text for found in models(paths, settings)]
    elif model is not None:
        lines = rollback.roll_back_model(paths, model, lambda kind, path: not why_not_loaded(kind, path, settings))
    else:
        lines = rollback.roll_back_case(paths, str(case))
    if as_json:
        given = {"round": number, "model": model, "case": case}
        return show({k: v for k, v in given.items() if v is not None} | {"done": lines}, True)
    for line in lines:
        typer.echo(line)


@ledger_app.command("labels")
def ledger_labels(studies: Studies, conf: Conf = None) -> None:
    """Say that label files hold the values of `labels` as it is set now, where earlier rounds took them for others."""
    from aslseg.rounds.label_files.label_values import note_values

    settings = read_settings(conf)[0]
    note_values(_ledger(studies, conf), settings)
    typer.echo(f"noted: {', '.join(f'{n} = {value}' for value, n in enumerate(settings.labels, 1))}")


@ledger_app.command("verify")
def ledger_verify(
    studies: Studies,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended, and say each thing.")] = False,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Check that ledger, reports and label files are as they were written; exit code 1 if not."""
    settings = read_settings(conf)[0]
    from aslseg.rounds.label_files.masks import verify_label_files
    from aslseg.settings import Paths

    paths = Paths(settings, studies)
    done = _repair(studies, paths, settings) if repair else []
    problems = verify_label_files(paths)
    if as_json:
        show({"ok": not problems, "problems": problems} | ({"repaired": done} if repair else {}), True)
    else:
        for line in (*done, *(problems or ["the ledger and all label files are as they were written"])):
            typer.echo(line)
    if problems:
        raise typer.Exit(1)


def _repair(studies: Path, paths: Paths, settings: Settings) -> list[str]:
    from aslseg.files import sha256
    from aslseg.rounds.label_files.label_info import human_label_infos
    from aslseg.rounds.label_files.repair import repair

    done = repair(paths)
    if any(info.get("sha256", sha256(path)) != sha256(path) for _, _, path, info in human_label_infos(studies)):
        # MONAI Label takes seconds to import
        from aslseg.serving.studies_datastore import StudiesDatastore

        store = StudiesDatastore(str(studies), settings, paths)
        done += [*store.corrected, *store.check_labels(thorough=True)]
        store.flush()
    return done


def _ledger(studies: Path, conf: list[str] | None) -> Any:
    from aslseg.rounds.ledger.ledger import Ledger
    from aslseg.settings import Paths

    return Ledger(Paths(read_settings(conf)[0], studies).ledger)
