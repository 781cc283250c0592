"""The command line: ``aslseg import``, ``aslseg round`` and the others; ``aslseg --help`` lists them.

Exit codes: 0 done, 1 failed, 2 wrong arguments or settings. Heavy imports wait until a command needs them, so that
``aslseg --help`` is quick and thread settings can be made before torch starts its threads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aslseg import console
from aslseg.commands.importing import import_folder
from aslseg.errors import AslsegError, BadSettingsError

if TYPE_CHECKING:
    from aslseg.settings import Settings
    from aslseg.types import ProgressCallback

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Semi-supervised segmentation with SAM in the loop, as a MONAI Label app. Research use only.",
)
ledger_app = typer.Typer(no_args_is_help=True, help="What rounds decided: list it, check it, take it back.")
app.add_typer(ledger_app, name="ledger")
app.command("import")(import_folder)

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
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def info(
    as_json: Json = False,
    studies: Annotated[Path | None, typer.Option("--studies", help="Only models of this studies folder.")] = None,
    sam_checkpoint: Annotated[Path | None, typer.Option(help="Describe this SAM file instead.")] = None,
    conf: Conf = None,
) -> None:
    """Versions, settings and where they come from, plug-ins, published models."""
    settings, origin = _settings(conf)
    if sam_checkpoint is not None:
        from aslseg.sam.modeling.checkpoints import describe

        return _show(describe(sam_checkpoint, settings), as_json)
    from aslseg.models.published import list_published
    from aslseg.registry import NETWORKS, RECIPES, SSL_METHODS

    _show(
        {
            "versions": console.versions(),
            "settings": {k: {"value": v, "source": origin[k]} for k, v in settings.model_dump().items()},
            "ssl_methods": sorted(SSL_METHODS),
            "networks": sorted(NETWORKS),
            "recipes": sorted(RECIPES),
            "models": list_published(settings, studies),
        },
        as_json,
    )


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Studies folder to make.")],
    cases: Annotated[int, typer.Option(help="Scans.")] = 12,
    labelled: Annotated[int, typer.Option(help="How many of them get a label.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder of phantoms.")] = False,
    as_json: Json = False,
) -> None:
    """Make a studies folder of synthetic abdominal CTs; the truth of the unlabelled ones goes to OUT_truth."""
    from aslseg.volume.phantom import write_studies

    with _shown() as report:
        result = write_studies(out, cases, labelled, seed, overwrite=overwrite, report=report)
    _show(result, as_json)


@app.command()
def train(
    kind: Annotated[str, typer.Argument(help="ssl, sam or adapter")],
    studies: Studies,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Train one model, with what it is built on; it is published if it is not worse than the published one."""
    if kind not in ("ssl", "sam", "adapter"):
        raise typer.BadParameter(f"expected ssl, sam or adapter, got {kind!r}")
    settings = _ready(conf)
    from aslseg.rounds.run import train_stage

    with _leading(settings) as leading:
        if not leading:
            return
        with _shown() as report:
            summary = train_stage(kind, studies, settings, report)
    _show(summary, as_json)


@app.command("round")
def round_(
    studies: Studies,
    rounds: Annotated[int, typer.Option(min=1, help="How many, one after the other.")] = 1,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Run a round: train, predict, rank, promote, retrain, publish. Goes on where an interrupted one stopped."""
    settings = _ready(conf)
    from aslseg.rounds.run import run_round

    summaries = []
    with _leading(settings) as leading:
        for _ in range(rounds if leading else 0):
            with _shown() as report:
                summaries.append(run_round(studies, settings, report))
            if not as_json:
                _show(console.brief(summaries[-1]), False)
    if not leading:
        return
    if as_json:
        _show(summaries[0] if rounds == 1 else summaries, True)


@app.command()
def rank(studies: Studies, conf: Conf = None, as_json: Json = False) -> None:
    """Agreement of every scan without a human label, lowest first, with the published models."""
    settings = _ready(conf)
    from aslseg.rounds.run import rank_studies

    with _shown() as report:
        scores = rank_studies(studies, settings, report)
    if as_json:
        return _show(scores, True)
    for case, agreement in scores.items():
        typer.echo(f"{agreement:.4f}  {case}")


@app.command()
def embed(
    studies: Studies,
    cases: Annotated[int, typer.Option(min=1, help="How many scans, in the order the strategy hands them out.")] = 10,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Encode the scans that annotators will get next, so that their first clicks find everything ready."""
    settings = _ready(conf)
    from aslseg.serving.embed import embed_studies

    with _shown() as report:
        summary = embed_studies(studies, settings, cases, report)
    _show(summary, as_json)


@app.command()
def infer(
    model: Annotated[str, typer.Option(help="ssl, sam, adapter or aslseg (all of them in turn).")],
    input_: Annotated[Path, typer.Option("--input", help="A scan, or a folder of scans.")],
    output: Annotated[Path, typer.Option("--output", help="Label file, or folder of label files.")],
    studies: Annotated[Path, typer.Option("--studies", help="Studies folder whose published models are used.")],
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Segment scans with the published models. A bad file is skipped with its reason; exit code 1 if any was."""
    if model not in ("ssl", "sam", "adapter", "aslseg"):
        raise typer.BadParameter(f"expected ssl, sam, adapter or aslseg, got {model!r}", param_hint="--model")
    settings = _ready(conf)
    from aslseg.models.cascade import segment_files
    from aslseg.settings import Paths

    with _shown() as report:
        written, skipped = segment_files(model, input_, output, Paths(settings, studies), settings, report)
    _show({"written": written, "skipped": skipped}, as_json)
    if skipped or not written:
        raise typer.Exit(1)


@app.command()
def evaluate(
    pred: Annotated[Path, typer.Option(help="Folder of predicted labels.")],
    truth: Annotated[Path, typer.Option(help="Folder of true labels, same file names.")],
    unit: Annotated[str, typer.Option(help="Unit of the distances: mm or voxel.")] = "mm",
    regions: Annotated[bool, typer.Option(help="Score a label together with what lies inside it.")] = False,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Dice, Jaccard, HD95 (pooled) and ASD per case and label, of any two folders of label files."""
    if unit not in ("mm", "voxel"):
        raise typer.BadParameter(f"expected mm or voxel, got {unit!r}", param_hint="--unit")
    settings = _ready(conf)
    from aslseg.agreement.evaluate import evaluate_folders, to_markdown

    with _shown() as report:
        result = evaluate_folders(pred, truth, settings.label_set, unit, regions, report)  # type: ignore[arg-type]
    if as_json:
        return _show(result, True)
    typer.echo(to_markdown(result))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    studies: Annotated[str, typer.Option(help="Studies folder or DICOMweb address.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
    conf: Conf = None,
) -> None:
    """Start MONAI Label with this app; further arguments go to `monailabel start_server`."""
    _ready(conf)
    from aslseg.settings import APP_DIR

    command = [
        sys.executable,
        "-m",
        "monailabel.main",
        "start_server",
        "--app",
        str(APP_DIR),
        "--studies",
        studies,
    ]
    command += ["--host", host, "--port", str(port)]
    for key, value in console.conf_pairs(conf).items():
        command += ["--conf", key, value]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *context.args])  # noqa: S606 - our own interpreter


@ledger_app.command("list")
def ledger_list(studies: Studies, conf: Conf = None, as_json: Json = False) -> None:
    """Rounds and promotions, with what became of them."""
    from dataclasses import asdict

    ledger = _ledger(studies, conf)
    rounds, promotions = ledger.rounds(), ledger.promotions(active_only=False)
    if as_json:
        return _show({"rounds": [asdict(r) for r in rounds], "promotions": [asdict(p) for p in promotions]}, True)
    for r in rounds:
        ours = [p for p in promotions if p.round == r.number]
        end = f", {r.error}" if r.error and r.state == "open" else ""
        typer.echo(f"round {r.number}: {r.state}, opened {r.opened}, {len(ours)} promoted{end}")
        for p in ours:
            agreement = ", ".join(f"{k} {'-' if v is None else f'{v:.4f}'}" for k, v in p.agreement.items())
            typer.echo(f"  {p.case}: {p.status}, agreement {agreement}, mask {p.sha256[:12]}")
    if not rounds:
        typer.echo("no rounds yet")


@ledger_app.command("rollback")
def ledger_rollback(
    studies: Studies,
    number: Annotated[int, typer.Option("--round", help="Undo this round and all later ones.")],
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Put labels and published models back to what they were before a round; human labels stay."""
    settings = _settings(conf)[0]
    from aslseg.rounds.masks import roll_back
    from aslseg.settings import Paths

    lines = roll_back(Paths(settings, studies), number)
    if as_json:
        return _show({"round": number, "done": lines}, True)
    for line in lines:
        typer.echo(line)


@ledger_app.command("verify")
def ledger_verify(studies: Studies, conf: Conf = None, as_json: Json = False) -> None:
    """Check the ledger's hash chain, and that label files are what it says; exit code 1 if not."""
    settings = _settings(conf)[0]
    from aslseg.rounds.masks import verify_label_files
    from aslseg.settings import Paths

    problems = verify_label_files(Paths(settings, studies))
    if as_json:
        _show({"ok": not problems, "problems": problems}, True)
    else:
        for problem in problems or ["the ledger and all label files are as they were written"]:
            typer.echo(problem)
    if problems:
        raise typer.Exit(1)


def _ledger(studies: Path, conf: list[str] | None) -> Any:
    from aslseg.rounds.ledger import Ledger
    from aslseg.settings import Paths

    return Ledger(Paths(_settings(conf)[0], studies).ledger)


def _settings(conf: list[str] | None) -> tuple[Settings, dict[str, str]]:
    from aslseg.settings import load_settings

    return load_settings(console.conf_pairs(conf))


def _ready(conf: list[str] | None) -> Settings:
    """The settings, with the environment that torch's threads want to find when they start."""
    settings = _settings(conf)[0]
    # OpenMP threads that spin while they wait starve each other as soon as two processes share a machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    return settings


@contextmanager
def _leading(settings: Settings) -> Iterator[bool]:
    """Whether this process does the work; the others that torchrun started first help it until it is done."""
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
    # not after an error: torchrun ends the others, which may be waiting in the middle of a step
    worker.stop_workers()


def _show(content: Any, as_json: bool) -> None:
    for line in [json.dumps(content, indent=2, default=str)] if as_json else console.lines(content):
        typer.echo(line)


@contextmanager
def _shown() -> Iterator[ProgressCallback]:
    """A report function that keeps one line on the terminal, or now and then prints one to a log; on stderr."""
    terminal = sys.stderr.isatty()
    line = console.ProgressLine(every=0.2 if terminal else 15.0)

    def report(done: float, total: float, **shown: Any) -> None:
        text = line(done, total, **shown)
        if text:
            typer.echo(f"\r\033[K{text}" if terminal else text, err=True, nl=not terminal)

    try:
        yield report
    finally:
        if terminal:
            typer.echo("", err=True)


def main() -> NoReturn:
    """The ``aslseg`` command."""
    try:
        app(console.joined(sys.argv[1:]))
    except BadSettingsError as error:
        typer.echo(f"aslseg: {error}", err=True)
        sys.exit(2)
    except AslsegError as error:
        typer.echo(f"aslseg: {error}", err=True)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
