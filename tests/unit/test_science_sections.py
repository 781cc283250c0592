"""Every section of docs/science.md that code, tests or docs cite is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lib", "benchmarks", "scripts", "tests", "docs", "apps")
CITED = re.compile(r"science\.md\)?,?\s(?:§|section )(\d+(?:\.\d+)?)(?:(?:,| and)\s§(\d+(?:\.\d+)?))*")


def cited() -> dict[str, set[str]]:
    """Section to the files that cite it."""
    found: dict[str, set[str]] = {}
    for path in (p for folder in FOLDERS for end in ("py", "md") for p in (ROOT / folder).rglob(f"*.{end}")):
        for match in CITED.finditer(path.read_text(encoding="utf-8")):
            for number in re.findall(r"\d+(?:\.\d+)?", match[0]):
                found.setdefault(number, set()).add(str(path.relative_to(ROOT)))
    return found


def test_cited_sections_exist() -> None:
    page = (ROOT / "docs" / "science.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?) ", page, re.MULTILINE))
    found = cited()
    assert len(found) > 5
    assert {n: files for n, files in found.items() if n not in sections} == {}
