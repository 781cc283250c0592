"""The command line: ``aslseg import``, ``aslseg round`` and the others; ``aslseg --help`` lists them.

Exit codes: 0 done, 1 failed, 2 wrong arguments or settings. Heavy modules are imported by the commands that need
them, so that ``aslseg --help`` is quick and threads can be set before torch starts them.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from aslseg import console
from aslseg.commands.doctor import doctor
from aslseg.commands.importing import import_folder
from aslseg.commands.ledger import ledger_app
from aslseg.commands.options import LOCAL, Conf, Json, Studies, leading, read_settings, ready, require_no_round, show
from aslseg.commands.report import report
from aslseg.commands.rounds import nightly, round_
from aslseg.errors import AslsegError, BadSettingsError
from aslseg.files import FULL

logger = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Semi-supervised segmentation with SAM in the loop, as a MONAI Label app. Research use only.",
)
app.add_typer(ledger_app, name="ledger")
app.command("import")(import_folder)
app.command("round")(round_)
app.command()(nightly)
app.command()(doctor)
app.command()(report)


@app.command()
def info(
    as_json: Json = False,
    studies: Annotated[Path | None, typer.Option("--studies", help="Only models of this studies folder.")] = None,
    sam_checkpoint: Annotated[Path | None, typer.Option(help="Describe this SAM file instead.", **LOCAL)] = None,
    conf: Conf = None,
) -> None:
    """Versions, settings and where they come from, plug-ins, published models."""
    settings, origin = read_settings(conf)
    if sam_checkpoint is not None:
        from aslseg.sam.modeling.checkpoints import describe

        return show(describe(sam_checkpoint, settings), as_json)
    from aslseg.compute.hardware import resolved
    from aslseg.models.published import list_published
    from aslseg.registry import NETWORKS, RECIPES, SSL_METHODS
    from aslseg.rounds.gate.fresh import with_fresh_dice

    given, used = settings.model_dump(), resolved(settings).model_dump()
    shown = {
        k: {"value": v, "source": origin[k]} | ({"used": used[k]} if used[k] != v else {}) for k, v in given.items()
    }
    found = {
        "versions": console.versions(),
        "settings": shown,
        "ssl_methods": sorted(SSL_METHODS),
        "networks": sorted(NETWORKS),
        "recipes": sorted(RECIPES),
        "models": with_fresh_dice(list_published(settings, studies), settings, studies),
    }
    if as_json or not console.on_terminal(sys.stdout):
        return show(found, as_json)
    console.print_info(found)


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Studies folder to make.", **LOCAL | {"metavar": "OUT"})],
    cases: Annotated[int, typer.Option(help="Scans.")] = 12,
    labelled: Annotated[int, typer.Option(help="How many of them get a label.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder of phantoms.")] = False,
    as_json: Json = False,
) -> None:
    """Make a studies folder of synthetic abdominal CTs; the truth of the unlabelled ones goes to OUT_truth."""
    from aslseg.volume.phantom import write_studies

    with console.progress() as report:
        result = write_studies(out, cases, labelled, seed, overwrite=overwrite, report=report)
    show(result, as_json)


@app.command()
def train(
    kind: Annotated[str, typer.Argument(help="ssl, sam or adapter")],
    studies: Studies,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Train one model, with those it needs; it is published by the rules of docs/nights.md, on the validation cases.

    As in a round, the folds are trained where the model depends on them; what a round has made is found.
    """
    if kind not in ("ssl", "sam", "adapter"):
        raise typer.BadParameter(f"expected ssl, sam or adapter, got {kind!r}")
    settings = ready(conf)
    require_no_round(studies, settings)
    from aslseg.rounds.run import train_stage

    with leading(settings) as leads:
        if not leads:
            return
        with console.progress() as report:
            summary = train_stage(kind, studies, settings, report)
    show(summary, as_json)


@app.command()
def rank(studies: Studies, conf: Conf = None, as_json: Json = False) -> None:
    """Agreement of every scan without a human label, lowest first; measured again where scan or models have changed."""
    settings = ready(conf)
    from aslseg.rounds.ranking import rank_studies

    with console.progress() as report:
        scores = rank_studies(studies, settings, report)
    if as_json:
        return show(scores, True)
    if console.on_terminal(sys.stdout):
        rows = ((case, f"{agreement:.4f}") for case, agreement in scores.items())
        return console.print_table("Lowest agreement first", ("scan", "agreement"), rows)
    for case, agreement in scores.items():
        typer.echo(f"{agreement:.4f}  {case}")


@app.command()
def embed(
    studies: Studies,
    cases: Annotated[int, typer.Option(min=1, help="How many scans, in the order the strategy hands them out.")] = 10,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Encode the scans that annotators will get next, so that their first clicks need not wait for the encoder."""
    settings = ready(conf)
    from aslseg.serving.embed import embed_studies

    with console.progress() as report:
        summary = embed_studies(studies, settings, cases, report)
    show(summary, as_json)


@app.command()
def infer(
    model: Annotated[str, typer.Option(help="ssl, sam, adapter or aslseg (all of them in turn).")],
    input_: Annotated[Path, typer.Option("--input", help="A scan, or a folder of scans.", **LOCAL)],
    output: Annotated[
        Path,
        typer.Option("--output", help="Label file, or folder of label files.", **LOCAL),
    ],
    studies: Annotated[Path, typer.Option("--studies", help="Studies folder whose published models are used.")],
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Segment scans with the published models. A bad file is skipped with its reason, and the exit code is 1."""
    if model not in ("ssl", "sam", "adapter", "aslseg"):
        raise typer.BadParameter(f"expected ssl, sam, adapter or aslseg, got {model!r}", param_hint="--model")
    settings = ready(conf)
    from aslseg.models.cascade import segment_files
    from aslseg.settings import Paths

    with console.progress() as report:
        written, skipped = segment_files(model, input_, output, Paths(settings, studies), settings, report)
    show({"written": written, "skipped": skipped}, as_json)
    if skipped or not written:
        raise typer.Exit(1)


@app.command()
def evaluate(
    pred: Annotated[Path, typer.Option(help="Folder of predicted labels.", **LOCAL)],
    truth: Annotated[Path, typer.Option(help="Folder of true labels, same file names.", **LOCAL)],
    unit: Annotated[str, typer.Option(help="Unit of the distances: mm or voxel.")] = "mm",
    regions: Annotated[bool, typer.Option(help="Score a label together with what lies inside it.")] = False,
    conf: Conf = None,
    as_json: Json = False,
) -> None:
    """Overlap, surface distances and lesions found, per case and label, of any two folders of label files."""
    if unit not in ("mm", "voxel"):
        raise typer.BadParameter(f"expected mm or voxel, got {unit!r}", param_hint="--unit")
    settings = ready(conf)
    from aslseg.agreement.evaluate import evaluate_folders, to_markdown

    with console.progress() as report:
        result = evaluate_folders(pred, truth, settings.label_set, unit, regions, report)  # type: ignore[arg-type]
    if as_json:
        return show(result, True)
    text = to_markdown(result)
    if console.on_terminal(sys.stdout):
        return console.print_markdown(text)
    typer.echo(text)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    studies: Annotated[str, typer.Option(help="Studies folder or DICOMweb address.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
    conf: Conf = None,
) -> None:
    """Start MONAI Label with this app; further arguments go to `monailabel start_server`."""
    # threads that sleep between two layers make a click slower; so they spin for a tenth of a millisecond
    if sys.platform == "linux" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    settings = ready(conf)
    from aslseg.resources import prepare_app_dir
    from aslseg.serving.network_access import require_safe_exposure

    require_safe_exposure(host, settings)
    # glibc keeps freed blocks of up to 32 MB for the next layer instead of asking the kernel for new pages
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(64 << 20))

    command = [
        sys.executable,
        "-P",  # Python files of the current folder, which may be the studies folder, are not ours
        "-m",
        "monailabel.main",
        "start_server",
        "--app",
        str(prepare_app_dir()),
        "--studies",
        studies,
    ]
    command += ["--host", host, "--port", str(port)]
    for key, value in console.conf_pairs(conf).items():
        command += ["--conf", key, value]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *context.args])  # noqa: S606 - our own interpreter


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Who will log in: letters, digits, '.', '_' and '-'.")],
    role: Annotated[str, typer.Option(help="annotator, reviewer or admin.")] = "annotator",
) -> None:
    """Make a token: print it, and the line for the file of the setting token_file, which holds only its hash."""
    from aslseg.serving.tokens import new_token_line

    secret, line = new_token_line(name, role)
    typer.echo(f"token of {name}, shown only now: {secret}", err=True)
    typer.echo(line)


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
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:  # not of the operating system: a fault of a program, which needs its traceback
            raise
        logger.debug("refused by the operating system", exc_info=True)
        typer.echo(f"aslseg: {_refused(error)}", err=True)
        sys.exit(1)
    sys.exit(0)


def _refused(error: OSError) -> str:
    """What the operating system has refused, and what to do."""
    place = "" if error.filename is None else f"{error.filename}: "
    if error.errno in FULL:
        return f"{place}{error.strerror}; free some space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{place}{error.strerror}; expected files and folders that this user may read and write. Check their "
            "owner, their permissions and the disk, and run again"
        )
    return f"{place}{error.strerror}; mend that, and run again"


if __name__ == "__main__":
    main()
