"""The files of docs/deploy name what exists, run as no root, and are understood by their programs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from aslseg.cli import app
from aslseg.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "docs" / "deploy"
UNIT = (DEPLOY / "aslseg.service").read_text()
NIGHT = (DEPLOY / "aslseg-night.service").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def options(command: str) -> set[str]:
    """The options of a command of ours."""
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name for parameter in found.params for name in parameter.opts}


def values(key: str, unit: str = UNIT) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)


def test_the_unit_starts_our_server() -> None:
    program, command, *arguments = shlex.split(values("ExecStart")[0])
    assert (Path(program).name, command) == ("aslseg", "serve")
    assert {a for a in arguments if a.startswith("--")} <= options("serve")
    variables = dict(pair.split("=", 1) for pair in values("Environment"))
    assert {a for a in arguments if a.startswith("$")} == {f"${{{v}}}" for v in ("STUDIES", "ADDRESS", "PORT")}
    assert {"STUDIES", "ADDRESS", "PORT"} <= variables.keys()
    assert values("User") == ["aslseg"]
    assert values("NoNewPrivileges") == ["true"]


def test_the_unit_of_a_night_runs_our_command_as_the_server_runs() -> None:
    program, command, *arguments = shlex.split(values("ExecStart", NIGHT)[0])
    assert (Path(program).name, command) == ("aslseg", "nightly")
    assert {a for a in arguments if a.startswith("--")} <= options("nightly")
    for key in ("User", "Group", "UMask", "EnvironmentFile", "WorkingDirectory", "StateDirectory", "ReadWritePaths"):
        assert values(key, NIGHT) == values(key), key
    shared = set(values("Environment")) & set(values("Environment", NIGHT))
    assert {pair.split("=")[0] for pair in shared} >= {"STUDIES", "ASLSEG_APP_DIR", "ASLSEG_MODEL_DIR", "HOME"}


def test_environments_name_settings() -> None:
    found = re.findall(r"\bASLSEG_(\w+)", UNIT + NIGHT + DOCKERFILE + (DEPLOY / "compose.yaml").read_text())
    assert found
    assert {name.lower() for name in found} - {"app_dir"} <= set(Settings.model_fields)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    units = [tmp_path / name for name in ("aslseg.service", "aslseg-night.service", "aslseg-night.timer")]
    for unit in units:
        text = (DEPLOY / unit.name).read_text()
        unit.write_text(text.replace("/opt/aslseg/.venv/bin/aslseg", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, timeout=300, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "aslseg" in line]
    assert (done.returncode, ours) == (0, [])


def test_the_image_starts_our_server_as_no_root() -> None:
    entry, command = (
        yaml.safe_load(re.search(rf"^{key} (.*)$", DOCKERFILE, re.MULTILINE)[1])  # type: ignore[index]
        for key in ("ENTRYPOINT", "CMD")
    )
    assert entry[:2] == ["aslseg", "serve"]
    assert {a for a in entry + command if a.startswith("--")} <= options("serve")
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == [COMPOSE["services"]["aslseg"]["user"]]
    for source in re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).exists(), source


def test_the_image_takes_in_no_secrets_and_no_scans() -> None:
    """BuildKit reads the file beside the Dockerfile that has its name and this ending."""
    ignored = set((DEPLOY / "Dockerfile.dockerignore").read_text().splitlines())
    mounted = [secret["file"] for secret in COMPOSE["secrets"].values()]
    mounted += [v.partition(":")[0] for service in COMPOSE["services"].values() for v in service["volumes"]]
    beside = {f"docs/deploy/{path[2:]}" for path in mounted if path.startswith("./")}
    assert beside == {"docs/deploy/tokens", "docs/deploy/orthanc-db"}
    assert ignored >= beside | {".git", ".venv", "**/.env", "demo", "work", "apps/aslseg/model", "apps/aslseg/logs"}


@pytest.mark.parametrize("name", ["aslseg", "orthanc"])
def test_services_run_as_no_root_and_listen_on_this_machine_only(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert (DEPLOY / COMPOSE["services"]["aslseg"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / COMPOSE["services"]["aslseg"]["build"]["dockerfile"]).is_file()
    assert {a for a in COMPOSE["services"]["aslseg"]["command"] if a.startswith("--")} <= options("serve")
