"""Write the tables of settings in docs/settings.md and the app's README from the Settings class, or check them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from aslseg.settings import Settings
from aslseg.settings.model import SECTIONS
from aslseg.settings.sources import REMOVED, RENAMED, RENAMED_VALUES

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "apps/aslseg/README.md", ROOT / "docs/settings.md"
BEGIN, END = "<!-- settings: begin (scripts/settings_table.py) -->", "<!-- settings: end -->"


def table(names: Iterable[str]) -> str:
    """These settings as a Markdown table."""
    rows = ["| setting | default | unit | example | meaning |", "|---|---|---|---|---|"]
    defaults = Settings().model_dump()
    for name in names:
        field, default = Settings.model_fields[name], defaults[name]
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        shown = "empty" if default == "" else f"`{_text(default)}`"
        rows.append(f"| `{name}` | {shown} | {extra['unit']} | `{extra['example']}` | {field.description} |")
    return "\n".join(rows)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def common() -> str:
    """The settings that most users need."""
    fields = Settings.model_fields.items()
    return table(n for n, f in fields if isinstance(f.json_schema_extra, dict) and f.json_schema_extra["common"])


def everything() -> str:
    """All settings by section, then the names that earlier versions had."""
    parts = [f"## {(section.__doc__ or '').rstrip('.')}\n\n{table(section.model_fields)}" for section in SECTIONS]
    renamed = [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    renamed += [f"| `{name} {old}` | `{name} {new}` |" for (name, old), new in RENAMED_VALUES.items()]
    renamed += [f"| `{name}` | nothing: the value is always {value} |" for name, value in REMOVED.items()]
    old = "\n".join(["| version 0.1 | now |", "|---|---|", *renamed])
    return "\n\n".join([*parts, f"## Names of version 0.1\n\n{old}"])


def updated(text: str, tables: str) -> str:
    """A page with fresh tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main() -> int:
    """Exit code 1 if ``--check`` was given and a page differs from the class."""
    for page, tables in ((README, common()), (PAGE, everything())):
        text = page.read_text()
        fresh = updated(text, tables)
        if text == fresh:
            continue
        if "--check" in sys.argv[1:]:
            return 1
        page.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
