"""What happens to data as it lies on people's disks: accepted, corrected with a note, or refused with a message.

    python benchmarks/bench_first_hour.py [--out FILE]

Makes each input in a temporary folder, gives it to the code that a server, a round or an import would give it to, and
prints a table in Markdown: what came of it, and in how many seconds. Inputs with the same code are small, so that the
seconds are those of the check and not of reading a scan.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from aslseg.errors import AslsegError
from first_hour_inputs import INPUTS


def main() -> None:
    """Make every input, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the table; by default it is printed")
    out: Path | None = parser.parse_args().out
    rows = [f"| {name} | {what} | {text} | {seconds:.2f} |" for name, what, text, seconds in table()]
    text = "\n".join(["| input | what happens | said | s |", "|---|---|---|---|", *rows]) + "\n"
    if out:
        out.write_text(text)
    else:
        sys.stdout.write(text)


def table() -> Iterator[tuple[str, str, str, float]]:
    """Input, what happens to it, what people are shown, and seconds."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aslseg").addHandler(handler)
    try:
        for group, name, function in INPUTS:
            notes.clear()
            with tempfile.TemporaryDirectory(prefix="first-hour-") as folder, warnings.catch_warnings(action="ignore"):
                what, text, seconds = happened(function, Path(folder), notes)
            yield f"{group}: {name}", what, text.replace(folder, "").replace("|", "/").replace("\n", " "), seconds
    finally:
        logging.getLogger("aslseg").removeHandler(handler)


def happened(function: Callable[[Path], str | None], folder: Path, notes: list[str]) -> tuple[str, str, float]:
    """What came of an input, in a word and in what people are shown, and the seconds that it took."""
    started = time.perf_counter()
    try:
        result = function(folder) or ""
    except AslsegError as error:
        return "refused", str(error), time.perf_counter() - started
    seconds = time.perf_counter() - started
    for word in ("refused", "asks", "left out"):
        if result.startswith(f"{word}: "):
            return word, result.removeprefix(f"{word}: "), seconds
    said = "; ".join(dict.fromkeys(notes))
    if said.startswith("passed over: "):
        return "left out", said.removeprefix("passed over: "), seconds
    return ("accepted, with a note", said, seconds) if said else ("accepted", result, seconds)


if __name__ == "__main__":
    main()
