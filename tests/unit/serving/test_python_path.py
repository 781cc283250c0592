"""A server that was started in the studies folder executes no Python files that lie there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aslseg.serving.app import refuse_python_of_the_current_folder


def test_processes_of_the_server_import_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("print('another one')")
    # as MONAI Label leaves it: an empty entry is the current folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep + "/somewhere/apps")
    imports = [sys.executable, "-c", "import colorsys"]

    def said() -> str:
        return subprocess.run(imports, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert said() == "another one"
    refuse_python_of_the_current_folder()
    assert said() == ""
    assert os.environ["PYTHONPATH"] == "/somewhere/apps"
