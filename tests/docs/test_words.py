"""Words that a reader of the field stumbles over: metaphors, and measurements in place of reasons."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for folder in ("lib", "apps", "scripts", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "apps" / "aslseg" / "README.md"]
WORDS = {
    r"\btold\b": "is called with, is given, knows",
    r"\bobey(s|ed)?\b": "enforce, follow",
    r"\bin a hurry\b": "time-limited",
    r"\ba promise\b": "a constraint",
    r"\bof then\b": "of that time",
    r"\bjourneys?\b": "propagation, range",
    r"\bbystanders?\b": "cases that are only predicted",
    r"\bworth 0\.\d": "a reason; the measurement belongs to docs/lab/",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def texts(path: Path) -> list[tuple[int, str]]:
    """Comments and strings of a source file, or all lines of a page, with their line numbers."""
    if path.suffix == ".md":
        return list(enumerate(path.read_text().splitlines(), 1))
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [(t.start[0], t.string) for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING)]


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=name)
def test_words(path: Path) -> None:
    found = [
        f"{name(path)}:{line}: {match.group()!r}; write: {better}"
        for line, text in texts(path)
        for word, better in WORDS.items()
        for match in re.finditer(word, text, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)
