"""The wheel in an empty environment away from the checkout: what it holds, and that its server answers."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import requests

import aslseg
from aslseg.files import sha256
from aslseg.volume.phantom import write_studies

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it, which borrows the packages it depends on from the tested one."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip("--python", folder / "bin" / "python", "install", "--no-deps", wheel)
    # packages only: .pth files in a folder named by a .pth file are not read, so an editable ASLseg stays out
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """An environment that says nothing of the checkout."""
    hidden = ("ASLSEG_", "MONAI_", "PYTHONPATH", "XDG_", "COV_", "COVERAGE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return kept | {"XDG_DATA_HOME": str(tmp_path / "data"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def server(
    environment: Path, outside: dict[str, str], tmp_path: Path, ports: Callable[[], int]
) -> Iterator[tuple[str, Path]]:
    """``aslseg serve`` of the installed wheel on two phantoms: its address and its log."""
    write_studies(tmp_path / "studies", 2, 0, 5, shape=(56, 48, 24))
    port, log = ports(), tmp_path / "server.log"
    command = [environment / "bin" / "aslseg", "serve", "--studies", "studies", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=outside, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}", log
    finally:
        process.terminate()
        process.wait(60)


def pip(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def wait(url: str, log: Path) -> dict:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            return requests.get(f"{url}/info/", timeout=60).json()
        except requests.ConnectionError:
            time.sleep(0.3)
    raise AssertionError(f"the server does not answer:\n{log.read_text()[-4000:]}")


def test_the_wheel_holds_the_app_and_the_small_sam(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    library = {str(p.relative_to(ROOT / "lib")) for p in (ROOT / "lib" / "aslseg").rglob("*.py")}
    assert library <= names
    assert {"aslseg/py.typed", "aslseg/app/main.py", "aslseg/app/pretrained/sam_small.safetensors"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks"))]


def test_the_installed_server_answers_and_leaves_its_package_alone(
    environment: Path, server: tuple[str, Path], tmp_path: Path
) -> None:
    site = next(environment.glob("lib/python3*/site-packages"))
    before = contents(site)
    url, log = server
    info = wait(url, log)
    assert info["version"] == version("aslseg") == aslseg.__version__
    assert list(info["models"]) == ["sam", "sam_2d"], "the small SAM that came with the wheel"
    point = np.array([28, 24, 12]).tolist()
    answer = requests.post(
        f"{url}/infer/sam_2d?image=phantom_000&output=image",
        data={"params": f'{{"label": "liver", "foreground": [{point}]}}'},
        timeout=300,
    )
    assert answer.ok, answer.text
    assert (tmp_path / "data" / "aslseg" / "main.py").resolve().is_relative_to(site)
    assert (tmp_path / "data" / "aslseg" / "logs").is_dir()
    assert contents(site) == before, "models and logs belong into the user's data"


def test_the_installed_sam_is_the_one_of_the_checkout(
    environment: Path, outside: dict[str, str], tmp_path: Path
) -> None:
    code = "import aslseg; from aslseg.resources import small_sam; print(aslseg.__file__, small_sam())"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        cwd=tmp_path,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    )
    package, sam = map(Path, done.stdout.split())
    assert package.is_relative_to(environment)
    assert sam.is_relative_to(environment)
    assert sha256(sam) == sha256(ROOT / "apps" / "aslseg" / "pretrained" / "sam_small.safetensors")
