"""Real servers for the tests in server/, security/ and browser/, and how tests are shared out between workers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tiny_server import TINY, TINY_SHAPE

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300


SHARED_SERVERS = {"starting": "trained", "trained": "trained", "untrained": "untrained"}  # fixture to xdist group


@pytest.hookimpl(tryfirst=True)  # pytest-xdist writes the groups into the tests' ids in this same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Share out tests between the workers of pytest-xdist.

    All tests of a file run in one worker, so that the file's fixtures are made once; so do all tests on a server that
    stays up for the session. These come first, because training that server's models takes longest.
    """
    groups = {}
    for item in items:
        used = [SHARED_SERVERS[name] for name in getattr(item, "fixturenames", ()) if name in SHARED_SERVERS]
        groups[item] = used[0] if used else ""
        item.add_marker(pytest.mark.xdist_group(groups[item] or str(item.path)))
    first = "test_server_first_hour"  # it needs a server that has not trained yet
    items.sort(key=lambda i: (not groups[i], i.path.stem != first, i.get_closest_marker("slow") is None))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail where pytest-xdist would share tests out without their groups; it does so in silence."""
    if getattr(session.config.option, "loadgroup", False):  # set in its workers only
        assert all("@" in item.nodeid for item in session.items), (
            "pytest-xdist has not put the groups into the ids of tests: is pytest newer than requirements.txt says?"
        )


def _with_own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


# a server in this process forbids its child processes the current folder, MLflow its telemetry: with variables that
# processes of later tests would inherit
_file_with_own_environment = pytest.fixture(autouse=True, scope="module")(_with_own_environment)
_test_with_own_environment = pytest.fixture(autouse=True)(_with_own_environment)


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Server:
    """A MONAI Label server in a process of its own.

    Attributes:
        studies: Folder or DICOMweb address.
        folder: Its log, temporary files and copy of the app.
    """

    studies: str
    folder: Path
    conf: dict[str, str]
    env: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def start(self) -> Server:
        """Start it; returns at once."""
        app = self.folder / "app"
        app.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "apps" / "aslseg" / "main.py", app)
        command = [
            sys.executable,
            "-m",
            "monailabel.main",
            "start_server",
            "--app",
            str(app),
            "--studies",
            self.studies,
        ]
        command += ["--host", self.host, "--port", str(self.port)]
        for key, value in (
            {
                "model_dir": str(self.folder / "models"),
                "min_free_gb": "0",
            }
            | self.conf
        ).items():
            command += ["--conf", key, value]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ASLSEG_", "MONAI_"))}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TMPDIR": str(self._tmp()),
        } | self.env
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        return self

    def wait(self, seconds: float = START_SECONDS, headers: dict[str, str] | None = None) -> Server:
        """Until it answers."""
        import requests

        assert self.process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}"
            try:
                if requests.get(f"{self.url}/info/", timeout=30, headers=headers).ok:
                    return self
            except requests.ConnectionError:
                time.sleep(0.2)
        raise AssertionError(f"the server does not answer after {seconds} s:\n{self.log[-4000:]}")

    def stop(self) -> None:
        """End it and everything it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(20)

    def client(self) -> Any:
        """MONAI Label's own client."""
        from monailabel.client import MONAILabelClient

        folder = self.folder / "client"
        folder.mkdir(exist_ok=True)
        return MONAILabelClient(self.url, tmpdir=str(folder), client_id="ann")

    def _tmp(self) -> Path:
        tmp = self.folder / "tmp"
        tmp.mkdir(exist_ok=True)
        return tmp


@pytest.fixture(scope="session")
def ports() -> Callable[[], int]:
    """Gives a free port at each call."""
    return free_port


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Start a server: ``serve(studies, env={}, **conf)``. All are stopped at the end of the session."""
    running: list[Server] = []

    def begin(studies: Path | str, env: dict[str, str] | None = None, host: str = "127.0.0.1", **conf: Any) -> Server:
        folder = tmp_path_factory.mktemp("server")
        server = Server(str(studies), folder, {k: str(v) for k, v in conf.items()}, env or {}, host)
        running.append(server)
        return server.start()

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def untrained(serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server on three phantoms without any label, with nothing trained."""
    from aslseg.volume.phantom import write_studies

    studies = tmp_path_factory.mktemp("untrained") / "studies"
    write_studies(studies, 3, 0, 5, shape=TINY_SHAPE)
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    (studies / "notes.txt").write_text("neither is this")
    # tests of saving share it: their labels must not set a round going
    return serve(studies, **TINY, first_round=False).wait()


@pytest.fixture(scope="session")
def starting(serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server on seven phantoms, three of them labelled, whose first round starts by itself."""
    from aslseg.volume.phantom import write_studies

    studies = tmp_path_factory.mktemp("phantoms") / "studies"
    write_studies(studies, 7, 3, 7, shape=TINY_SHAPE)
    return serve(studies, **TINY).wait()


@pytest.fixture(scope="session")
def trained(starting: Server) -> Server:
    """The same server when its first round is done; its models are kept in ``folder / "published"``."""
    import requests

    end = time.monotonic() + 900
    while time.monotonic() < end:
        status = requests.get(f"{starting.url}/aslseg/status", timeout=60).json()
        if status["progress"]["state"] == "done":
            models = starting.folder / "models"
            shutil.copytree(models, starting.folder / "published")
            return starting
        assert status["progress"]["state"] in ("none", "running"), status["progress"]
        time.sleep(1)
    raise AssertionError(f"the first round takes too long: {status['progress']}\n{starting.log[-3000:]}")
