"""Arguments, text, tables and progress of the command line."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from aslseg.errors import BadSettingsError

if TYPE_CHECKING:
    from aslseg.rounds.ledger.ledger import Promotion, RoundRow
    from aslseg.types import ProgressCallback

PACKAGES = (
    "aslseg",
    "monailabel",
    "monai",
    "torch",
    "torchvision",
    "segment-anything",
    "pytorch-ignite",
    "nibabel",
)


FEW = 5
"""Scans that a summary for people names."""


def joined(arguments: list[str]) -> list[str]:
    """Join ``--conf KEY VALUE``, as monailabel has it, to ``--conf KEY=VALUE``; arguments after ``--`` are kept."""
    out, rest = [], list(arguments)
    while rest:
        item = rest.pop(0)
        out.append(item)
        if item == "--" or not rest:
            return out + rest
        if item == "--conf":
            key = rest.pop(0)
            out.append(f"{key}={rest.pop(0)}" if "=" not in key and rest else key)
    return out


def conf_pairs(conf: list[str] | None) -> dict[str, str]:
    """``--conf`` arguments as setting and value.

    Raises:
        BadSettingsError: An argument without ``=``.
    """
    pairs = {}
    for item in conf or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise BadSettingsError(f"--conf {item}: expected a key and a value")
        pairs[key] = value
    return pairs


def studies_folder(text: str) -> Path:
    """The value of a ``--studies`` that must be a folder.

    Raises:
        BadSettingsError: It is a DICOMweb address.
    """
    if _is_address(text):
        raise BadSettingsError(
            f"--studies {text}: a DICOMweb address, but this command reads labelled scans from a folder. Start "
            f"the server on the address (aslseg serve --studies {text}), and train on a folder of exported scans "
            "(docs/dicom.md)"
        )
    return Path(text)


def local_path(text: str) -> Path:
    """The value of an option or argument that must be a file or folder on this machine.

    Raises:
        BadSettingsError: It is an address.
    """
    if _is_address(text):
        raise BadSettingsError(
            f"{text}: an address, but a file or folder on this machine is expected; export the scans into a folder "
            "first (docs/dicom.md)"
        )
    return Path(text)


def _is_address(text: str) -> bool:
    return re.match(r"https?:/", text, re.IGNORECASE) is not None


def versions() -> dict[str, str]:
    """Installed versions, read without importing anything."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def short(value: Any) -> str:
    """A value in a line of text."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {short(v)}" for k, v in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def lines(content: Mapping[str, Any]) -> Iterator[str]:
    """A summary as text."""
    for key, value in content.items():
        if value and isinstance(value, dict | list):
            yield f"{key}:"
            for inner in value.items() if isinstance(value, dict) else value:
                yield f"  {inner[0]}: {short(inner[1])}" if isinstance(value, dict) else f"  {short(inner)}"
        else:
            yield f"{key}: {'none' if value in ([], {}) else short(value)}"


def brief(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A round's summary without the parts that only programs read."""
    from aslseg.rounds.ledger.audits import promise_lines

    lowest = sorted(summary["agreement"].items(), key=lambda pair: (pair[1], pair[0]))[:FEW]
    left = {case: "; ".join(d["reasons"]) for case, d in summary["decisions"].items() if not d["promoted"]}
    refused = dict(list(left.items())[:FEW])
    hidden = ("agreement", "decisions", "measured", "rates", "inputs", "models")
    shown = {k: v for k, v in summary.items() if k not in hidden}
    shown["promise"] = promise_lines(summary.get("promise", {}))
    more = len(left) - len(refused)
    if more:
        refused["and more"] = f"{more} scans"
    return shown | {"not promoted": refused, "lowest agreement": dict(lowest)}


def on_terminal(stream: TextIO) -> bool:
    """Whether a person looks at a stream; otherwise its text is written to a file, a pipe or a log."""
    return stream.isatty()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Draw a table on the terminal.

    Args:
        title: Above the table.
        columns: Their headings.
        rows: Values of each row.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(short(value)) for value in row))
    Console().print(table)


def print_info(found: Mapping[str, Any]) -> None:
    """Draw the tables of ``aslseg info`` on the terminal."""
    print_table("Versions", ("package", "version"), found["versions"].items())
    settings = ((name, s["value"], s.get("used", ""), s["source"]) for name, s in found["settings"].items())
    print_table("Settings", ("setting", "value", "used here", "source"), settings)
    plugins = ((kind, ", ".join(found[kind])) for kind in ("ssl_methods", "networks", "recipes"))
    print_table("Plug-ins", ("kind", "names"), plugins)
    columns = ("kind", "round", "date", "fresh_dice", "fresh_scans", "validation_dice", "cases", "path")
    models = ([model.get(column) for column in columns] for model in found["models"])
    print_table("Published models", columns, models)


def ledger_lines(
    rounds: Sequence[RoundRow],
    promotions: Sequence[Promotion],
    reasons: Mapping[int, str],
    promises: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[str]:
    """Rounds, each with its promotions, as text.

    Args:
        rounds, promotions: From the ledger.
        reasons: By round that promoted nothing, why.
        promises: By round, what it promised of the masks.
    """
    for r in rounds:
        ours = [p for p in promotions if p.round == r.number]
        end = f", {r.error}" if r.error and r.state == "open" else ""
        why = f": {reasons[r.number]}" if reasons.get(r.number) else ""
        yield f"round {r.number}: {r.state}, opened {r.opened}, {len(ours)} promoted{why}{end}"
        yield from (f"  {line}" for line in (promises or {}).get(r.number, ()))
        for p in ours:
            numbers = f"agreement {short(p.agreement)}; asked {asked(p.threshold)}"
            yield f"  {p.case}: {p.status}, {numbers}; mask {p.sha256[:12]}"
    if not rounds:
        yield "no rounds yet"


def print_ledger(
    rounds: Sequence[RoundRow],
    promotions: Sequence[Promotion],
    reasons: Mapping[int, str],
    promises: Mapping[int, Sequence[str]] | None = None,
) -> None:
    """Draw the tables of ``aslseg ledger list`` on the terminal; arguments as :func:`ledger_lines`."""
    promoted = Counter(p.round for p in promotions)
    print_table(
        "Rounds",
        ("round", "state", "opened", "promoted", "error, or why nothing was promoted"),
        ((r.number, r.state, r.opened, promoted[r.number], r.error or reasons.get(r.number, "")) for r in rounds),
    )
    lines = ((number, line) for number, found in (promises or {}).items() for line in found)
    print_table("Promises", ("round", "of the promoted masks"), lines)
    print_table(
        "Promotions",
        ("round", "scan", "state", "agreement", "asked", "mask"),
        ((p.round, p.case, p.status, short(p.agreement), asked(p.threshold), p.sha256[:12]) for p in promotions),
    )


def asked(threshold: Mapping[str, float]) -> str:
    """The agreement that was asked of each label for a promotion."""
    return ", ".join(f"{name} {value:g}" for name, value in threshold.items()) or "-"


def print_markdown(text: str) -> None:
    """Draw Markdown, tables included, on the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """A callback that shows progress on stderr: a bar on a terminal, or now and then a line in a log."""
    if on_terminal(sys.stderr):
        with progress_bar() as report:
            yield report
    else:
        yield PlainProgress(lambda text: sys.stderr.write(f"{text}\n"))


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Give a callback that keeps a progress bar with stage, numbers and time left on the terminal (stderr)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.fields[stage]}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1, stage="", numbers="", left="")
        started = time.monotonic()

        def report(done: float, total: float, *, stage: str = "", eta: float | None = None, **numbers: Any) -> None:
            left = _time_left(done, total, time.monotonic() - started, eta)
            text = "  ".join(_numbers(numbers))
            bar.update(task, completed=done, total=total or None, stage=stage, numbers=text, left=left)

        yield report


class PlainProgress:
    """A callback that writes lines of text about progress, for logs.

    Args:
        write: Takes a line.
        every: Seconds between two lines of one stage; a new stage always gives one.
    """

    def __init__(self, write: Callable[[str], object], every: float = 15.0) -> None:
        self.write, self.every, self.started = write, every, time.monotonic()
        self._stage, self._last = "", -every

    def __call__(self, done: float, total: float, *, stage: str = "", eta: float | None = None, **numbers: Any) -> None:
        now = time.monotonic() - self.started
        finished = not stage and done >= total
        if now - self._last < self.every and stage == self._stage and not finished:
            return
        self._stage, self._last = stage, now
        percent = f"{done / total:4.0%}" if total else ""
        texts = (percent, stage, *_numbers(numbers), _time_left(done, total, now, eta))
        self.write("  ".join(text for text in texts if text))


def _numbers(numbers: Mapping[str, Any]) -> list[str]:
    return [f"{name} {short(value)}" for name, value in numbers.items()]


def _time_left(done: float, total: float, elapsed: float, eta: float | None) -> str:
    """Minutes and seconds left: as estimated by the work itself, else in proportion to what is done."""
    if eta is None and done:
        eta = elapsed / done * (total - done)
    return "" if eta is None else f"{int(eta) // 60}:{int(eta) % 60:02d} left"
