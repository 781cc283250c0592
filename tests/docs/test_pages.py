"""The pages name what exists: links, anchors, paths, scripts, commands. Nothing points outside the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from aslseg.cli import app, ledger_app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, ROOT / "apps" / "aslseg" / "README.md", *sorted(DOCS.rglob("*.md"))]
LIVING = [page for page in PAGES if page.parent.name != "lab"]  # a lab note names what there was at its date
SOURCES = [p for folder in ("lib", "apps", "scripts", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
LINK = re.compile(r"(?<!!)!?\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.is_relative_to(ROOT), f"{target} leaves the repository"
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_paths_and_scripts_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:lib|tests|apps|docs|scripts|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or path == "apps/aslseg/model", path
    for script in re.findall(r"(?:python|bash) ((?:benchmarks|scripts|\.ci)/[\w./-]+)", text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", LIVING, ids=name)
def test_commands_exist(page: Path) -> None:
    known = {c.name or c.callback.__name__ for c in app.registered_commands} | {"ledger", "--help"}
    inside = {c.name or c.callback.__name__ for c in ledger_app.registered_commands}
    for command in re.findall(r"(?:^|`)aslseg ([\w -]+)", page.read_text(), re.MULTILINE):
        words = command.split()
        assert words[0] in known, command
        if words[0] == "ledger" and len(words) > 1:
            assert words[1] in inside, command


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=name)
def test_nothing_points_outside_the_repository(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".py" and ROOT / "benchmarks" not in path.parents:  # these name the pages that they write
        for page in re.findall(r"(?<![\w./\"-])[\w./-]*\w\.md\b", re.sub(r"https?://\S+", "", text)):
            assert (ROOT / page).is_file() or (path.parent / page).is_file(), f"{page}: no such page from the root"
    if ROOT / "benchmarks" not in path.parents:  # their data is outside
        assert "../shared" not in text


def test_the_index_lists_every_page() -> None:
    listed = {(DOCS / target.partition("#")[0]).resolve() for target in LINK.findall((DOCS / "README.md").read_text())}
    assert {p for p in DOCS.glob("*.md") if p.name != "README.md"} <= listed
    notes = {(DOCS / "lab" / t).resolve() for t in LINK.findall((DOCS / "lab" / "README.md").read_text())}
    assert {p for p in (DOCS / "lab").glob("*.md") if p.name != "README.md"} <= notes


def test_the_results_stay_short_and_say_how_they_were_made() -> None:
    text = (DOCS / "results.md").read_text()
    assert len(text.encode()) <= 8000
    for section in text.split("\n## ")[1:]:
        if re.search(r"^\|", section, re.MULTILINE):
            assert "`python benchmarks/" in section, section.splitlines()[0]


def test_versions_and_licence_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert changes.index("## [Unreleased]") < changes.index(f"## [{project['version']}]")
