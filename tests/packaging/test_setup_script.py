"""scripts/setup.sh with an interpreter that writes down what it is asked, in place of one that installs for minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/bash
echo "$PWD|${PYTHONDONTWRITEBYTECODE-unset}|$*" >> "$CALLS"
case "$*" in *import*) exit "${IMPORT:-0}" ;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script needs of a checkout whose environment is there, without any package."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "apps" / "aslseg").mkdir(parents=True)
    for name in ("scripts/setup.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    (programs / "python").write_text(PYTHON)
    (programs / "python").chmod(0o755)
    return tmp_path


def setup(checkout: Path, **env: str) -> tuple[int, list[str]]:
    """Exit code, and what the interpreter was asked: folder, PYTHONDONTWRITEBYTECODE, arguments."""
    calls = checkout / "calls"
    calls.write_text("")
    command = ["bash", "-c", ". scripts/setup.sh && setup"]
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"CALLS": str(calls)} | env, check=False, timeout=60)
    return done.returncode, calls.read_text().splitlines()


def test_the_first_start_finds_bytecode_whatever_the_environment_says(checkout: Path) -> None:
    code, calls = setup(checkout, PYTHONDONTWRITEBYTECODE="1")
    assert code == 0
    assert [call.split("|")[2].split()[:3] for call in calls[:2]] == [["-m", "pip", "install"]] * 2
    folder, written, arguments = calls[2].split("|")
    assert (Path(folder), written) == (checkout / "apps" / "aslseg", "unset")
    assert arguments.endswith("-c import monailabel.main, monailabel.app, main"), "what the server imports"


def test_after_a_pull_our_own_files_have_bytecode(checkout: Path) -> None:
    (checkout / "lib" / "aslseg").mkdir(parents=True)
    assert setup(checkout)[0] == 0
    code, calls = setup(checkout)
    assert (code, len(calls)) == (0, 1), "the packages are as they were"
    assert calls[0].split("|")[2] == f"-m compileall -q {checkout}/lib/aslseg {checkout}/apps/aslseg/main.py"


def test_who_may_not_write_the_programs_is_not_stopped_by_that(checkout: Path) -> None:
    assert setup(checkout)[0] == 0
    assert setup(checkout) == (0, []), "once for each list of packages"


def test_an_installation_that_cannot_be_imported_is_not_called_complete(checkout: Path) -> None:
    assert setup(checkout, IMPORT="1")[0] == 1
    assert not (checkout / ".venv" / "aslseg.stamp").exists()
    assert len(setup(checkout)[1]) == 3
