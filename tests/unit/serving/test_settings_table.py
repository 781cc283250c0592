"""The app's README tells every setting as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_table_of_settings_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "settings_table.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run python scripts/settings_table.py"
