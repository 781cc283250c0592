"""docs/troubleshooting.md and the messages in the source name the same things, in both directions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lib" / "aslseg"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# what stands for a value in a quoted message: dots, capitals, examples in quotes, numbers
VALUE = re.compile(r"…|\.\.|\b[A-Z]\b|'[^']*'|\d[\d.]*|[\[\]?:]")
LEAST = 6
"""Letters of the longest piece without values; less would be found anywhere."""
# where the messages of the first hour come from: scans, labels, tables, imports, clicks, submitted labels
ROOMS = ["volume/**/*.py", "cases/**/*.py", "prompts/*.py", "console.py", "settings/paths.py"]
ROOMS += [
    f"serving/{name}.py"
    for name in (
        *("labels", "empty_labels", "clicks", "infer", "series_cache", "dicomweb_datastore", "studies_datastore"),
        *("http_errors", "open_scans", "routes/inference", "routes/uploads"),
    )
]


def quoted() -> list[str]:
    """The messages that the first column of a table quotes."""
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("|") and "|---" not in line]
    return [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]


def piece(phrase: str) -> str:
    """The longest piece of a quoted message without values."""
    return max((part.strip(" ,;.()") for part in VALUE.split(phrase)), key=len)


def words(node: ast.AST) -> str:
    """The text of a string, with dots in place of its values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "…"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def raised(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each message of an error that is raised in a file, if it has words of its own."""
    for node in ast.walk(tree(path)):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and call.args and re.search(r"Error$|^error$", ast.unparse(call.func)):
            text = words(call.args[0])
            part = ast.unparse(call.func) in ("ValueError", "EOFError", "KeyError")  # of another message
            if not part and len(re.findall(r"[a-z]{3,}", text)) > 1:
                yield node.lineno, text


FILES = sorted({path for room in ROOMS for path in LIB.glob(room)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIB)))
def test_the_page_has_each_message_of_the_first_hour(path: Path) -> None:
    pieces = [found for found in map(piece, quoted()) if len(found) >= LEAST]
    missing = [f"{path.name}:{line}: {text}" for line, text in raised(path) if not any(p in text for p in pieces)]
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(missing)


def test_the_page_quotes_only_what_the_source_says() -> None:
    texts = {
        words(node) for path in LIB.rglob("*.py") for node in ast.walk(tree(path)) if not isinstance(node, ast.BinOp)
    }
    everything = "\n".join(text for text in texts if text != "…")
    stale = [phrase for phrase in quoted() if len(piece(phrase)) >= LEAST and piece(phrase) not in everything]
    assert not stale, stale


def test_every_quoted_message_can_be_told_from_others() -> None:
    short = [phrase for phrase in quoted() if len(piece(phrase)) < LEAST and " " in phrase]
    assert not short, short
