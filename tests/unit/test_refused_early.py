"""What can be refused at once is refused before torch is imported, which takes longer than everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aslseg.rounds.scheduling.lock import round_lock

RUN = """
import sys
from aslseg.cli import main
try:
    main()
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", [("round",), ("train", "ssl")])
def test_a_second_round(tmp_path: Path, command: tuple[str, ...]) -> None:
    with round_lock(tmp_path / ".aslseg"):
        found = run(*command, "--studies", str(tmp_path))
    assert found.stdout.split() == ["1", "False"], found.stderr
    assert "a round is already running (process" in found.stderr


def test_a_server_for_everybody_on_the_network(tmp_path: Path) -> None:
    found = run("serve", "--studies", str(tmp_path), "--host", "0.0.0.0")
    assert found.stdout.split() == ["2", "False"], found.stderr
    assert "without authentication" in found.stderr


def test_a_token_is_shown_once_and_its_line_holds_the_hash(tmp_path: Path) -> None:
    found = run("token", "anna", "--role", "reviewer")
    line, ended = found.stdout.splitlines()
    assert ended == "0 False"
    assert line.split()[:2] == ["anna", "reviewer"]
    secret = found.stderr.split()[-1]
    assert len(secret) > 40
    assert secret not in line
    assert "role" in run("token", "anna", "--role", "boss").stderr
