"""docs/settings.md and the app's README say what the Settings class says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_of_settings_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "settings_table.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run python scripts/settings_table.py"


def test_no_text_splits_its_cell() -> None:
    rows = [line for line in (ROOT / "docs" / "settings.md").read_text().splitlines() if line.startswith("| `")]
    wide = [row for row in rows if row.count("|") not in (3, 6)]
    assert rows
    assert not wide
