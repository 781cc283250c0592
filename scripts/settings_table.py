"""Write the table of settings in apps/aslseg/README.md from the Settings class, or check that it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from aslseg.settings import Settings

README = Path(__file__).resolve().parents[1] / "apps" / "aslseg" / "README.md"
BEGIN, END = "<!-- settings: begin (scripts/settings_table.py) -->", "<!-- settings: end -->"


def table() -> str:
    """The settings as a Markdown table."""
    rows = ["| setting | default | unit | example | what it does |", "|---|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = "empty" if field.default == "" else f"`{field.default}`"
        example = f"`{extra.get('example')}`" if extra.get("example") else ""
        text = str(field.description).replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {extra.get('unit') or ''} | {example} | {text} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """The README with a fresh table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Exit code 1 if ``--check`` was given and the table is not what Settings says."""
    text = README.read_text()
    fresh = updated(text)
    if "--check" in sys.argv[1:]:
        return int(text != fresh)
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
