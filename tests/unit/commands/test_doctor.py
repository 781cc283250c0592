"""``aslseg doctor``: each kind of trouble gives one line with a remedy, and a healthy folder none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from aslseg.commands import examine_installation as installation
from aslseg.commands import examine_studies as examined
from aslseg.commands.doctor import Finding
from aslseg.errors import LedgerError
from aslseg.files import sha256, write_json
from aslseg.models.published import put_manifest
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.settings import Paths, Settings, load_settings
from aslseg.volume.phantom import write_studies
from tiny_rounds import SHAPE


def settings(root: Path, **conf: Any) -> Settings:
    return load_settings({"min_free_gb": "0", "model_dir": str(root / "models"), **conf}, env={})[0]


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    write_studies(tmp_path / "studies", 3, 1, 1, shape=SHAPE)
    return tmp_path / "studies"


def abouts(findings: Iterator[Finding]) -> list[tuple[str, str]]:
    found = list(findings)
    for finding in found:
        assert "\n" not in finding.line()
        assert finding.remedy.endswith("."), finding
    return [(f.level, f.about) for f in found]


def test_a_healthy_folder(run: Callable[..., Any], studies: Path, tmp_path: Path) -> None:
    healthy = ("--studies", studies, "--conf", "min_free_gb", "0", "--conf", "model_dir", tmp_path / "models")
    code, out, err = run("doctor", *healthy)
    assert (code, out.strip(), err) == (0, "nothing wrong was found", "")
    (studies / "phantom_001.nii.gz").write_bytes(b"damaged")
    code, out, _ = run("doctor", "--json", *healthy)
    found = json.loads(out)
    assert (code, found["ok"], [f["about"] for f in found["findings"]]) == (1, False, ["scan"])
    code, out, _ = run("doctor", *healthy)
    assert out.count("\n") == 1
    assert out.startswith("error: scan: phantom_001.nii.gz")


def test_wrong_settings(run: Callable[..., Any]) -> None:
    code, out, _ = run("doctor", "--conf", "overlap", "lots")
    assert (code, out.startswith("error: settings: overlap")) == (1, True)


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abouts(installation.packages()) == []
    wanted = ["numpy>=99", "no-such-package>=1", "torch>=2", 'pytest>=99; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    assert [f.text for f in installation.packages()] == [
        f"numpy is {np.__version__}, and >=99 is needed",
        "no-such-package is not installed",
    ]
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    assert ("error", "python") in abouts(installation.packages())


def test_threads_and_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4000")
    wanted = settings(tmp_path, threads="5000", max_upload_gb="1e9")
    assert abouts(installation.machine(wanted)) == [("warning", "threads"), ("warning", "threads"), ("warning", "disk")]


def test_tokens_and_exposure(tmp_path: Path) -> None:
    assert abouts(installation.access(settings(tmp_path, insecure="true"))) == [("warning", "exposure")]
    tokens = tmp_path / "tokens"
    conf = settings(tmp_path, token_file=str(tokens), insecure="true")
    assert abouts(installation.access(conf)) == [("error", "tokens")]
    tokens.write_text(f"anna annotator {'0' * 64}\n")
    for mode, expected in ((0o600, []), (0o644, [("warning", "tokens")]), (0o666, [("error", "tokens")])):
        tokens.chmod(mode)
        assert abouts(installation.access(conf)) == expected


def test_a_sam_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "sam.pth").write_bytes(b"nothing")
    assert abouts(installation.pretrained(settings(tmp_path, sam_checkpoint=str(tmp_path / "sam.pth")))) == [
        ("error", "sam")
    ]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    found = abouts(installation.folders(settings(tmp_path), [tmp_path / "file" / "below", Path("/proc/1")]))
    assert found[:2] == [("error", "folders"), ("error", "folders")]
    full = settings(tmp_path, min_free_gb="1e9")
    assert abouts(installation.folders(full, [tmp_path])) == [("error", "disk")]


def test_scans_and_patients(studies: Path, tmp_path: Path) -> None:
    def found(read_all: bool = False) -> list[tuple[str, str]]:
        return abouts(examined.scans(studies, settings(tmp_path), read_all))

    assert found() == []
    whole = (studies / "phantom_002.nii.gz").read_bytes()
    (studies / "phantom_002.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert (found(), found(read_all=True)) == ([], [("error", "scan")])
    (studies / "labels" / "final" / "nobody.nii.gz").write_bytes(whole)
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), studies / "labels/final/phantom_000.nii.gz")
    assert found() == [("warning", "studies"), ("error", "label")]
    (studies / "patients.csv").write_text("case,patient\nphantom_000,\n")
    assert found() == [("error", "patients.csv")]
    assert abouts(examined.scans(tmp_path / "nothing", settings(tmp_path), False)) == [("error", "studies")]


def test_labels_that_somebody_copied(studies: Path, tmp_path: Path) -> None:
    paths = Paths(settings(tmp_path), studies)
    label = studies / "labels" / "final" / "phantom_000.nii.gz"
    info = {"ext": ".nii.gz", "info": {"sha256": sha256(label)}}
    write_json(studies / "datastore_v2.json", {"objects": {"phantom_000": {"labels": {"final": info}}}})
    assert abouts(examined.state(studies, paths)) == []
    label.write_bytes(label.read_bytes() + b"copied over")
    assert abouts(examined.state(studies, paths)) == [("error", "ledger")]


def test_files_that_were_kept(studies: Path, tmp_path: Path) -> None:
    paths = Paths(settings(tmp_path), studies)
    assert abouts(examined.kept_files(studies, paths)) == []
    (paths.home / "parked").mkdir(parents=True)
    (paths.home / "parked" / "phantom_001-0123.nii.gz").write_bytes(b"a drawing")
    (studies / "datastore_v2.json.damaged-1").write_bytes(b"{")
    assert abouts(examined.kept_files(studies, paths)) == [("warning", "parked"), ("warning", "datastore")]


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_locks_and_ledger(studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Paths(settings(tmp_path), studies)
    assert abouts(examined.state(studies, paths)) == []
    with round_lock(paths.home):
        found = list(examined.state(studies, paths))
        assert [f.about for f in found] == ["round"]
        assert f"process {os.getpid()} on" in found[0].text
    write_json(paths.home / "round.owner.json", {"pid": 1, "host": "h", "since": "s"})
    for _ in range(2):
        assert ["was killed" in f.text for f in examined.state(studies, paths)] == [True], "looking changes nothing"
    (paths.home / "round.owner.json").unlink()
    monkeypatch.setattr(examined, "LOCK_SECONDS", 0.05)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(studies / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = list(examined.state(studies, paths))
        assert [f.about for f in found] == ["lock"]
        assert f"process {holder.pid}" in found[0].text
        holder.communicate(b"\n")
    paths.home.mkdir(exist_ok=True)
    paths.ledger.write_bytes(b"damaged" * 1000)
    with pytest.raises(LedgerError):
        Ledger(paths.ledger).rounds()
    assert abouts(examined.state(studies, paths)) == [("error", "ledger")]


def test_models_that_do_not_load(studies: Path, tmp_path: Path) -> None:
    conf = settings(tmp_path)
    paths = Paths(conf, studies)
    paths.models.mkdir()
    (paths.models / "ssl.safetensors").write_bytes(b"no model")
    entry = {"file": "ssl.safetensors", "bytes": 8, "sha256": sha256(paths.models / "ssl.safetensors"), "date": ""}
    entry |= {"validation_dice": None, "validation_cases": 0, "round": 1}
    put_manifest(paths, {"ssl": entry, "adapter": entry | {"file": "gone.safetensors"}})
    found = list(examined.models(paths, conf))
    assert sorted(f.text.split(" ")[2] for f in found) == ["adapter", "ssl"]
    assert {f.level for f in found} == {"error"}


@pytest.fixture
def pacs() -> Iterator[SimpleNamespace]:
    """A server on this machine that answers every request with ``status``."""
    state = SimpleNamespace(status=200, paths=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.paths.append(self.path)
            self.send_response(state.status)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}/dicom-web/"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def test_a_pacs(pacs: SimpleNamespace) -> None:
    found = {}
    for pacs.status in (200, 401, 404):
        found[pacs.status] = [f.text.rsplit(" ", 1)[-1] for f in examined.pacs(pacs.url)]
    assert found == {200: [], 401: ["(401)"], 404: ["404"]}
    assert pacs.paths[0] == "/dicom-web/studies?limit=1"
    assert abouts(examined.pacs("http://127.0.0.1:9/dicom-web")) == [("error", "pacs")]
