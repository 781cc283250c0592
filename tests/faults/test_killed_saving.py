"""Saving, replacing and deleting, killed or refused by the disk at any step: the old state or the new, never a mix."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
import pytest
from durable_writes import at_number, killed_in_fork, watched

from aslseg.cases.studies import FINAL
from aslseg.errors import AslsegError
from aslseg.files import sha256
from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.label_files.repair import repair
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.serving.write_behind import WriteBehind
from aslseg.settings import Paths, load_settings
from aslseg.volume import untrusted
from aslseg.volume.fork_server import ForkServer

SETTINGS, _ = load_settings({"min_free_gb": "0"}, env={})
SHAPE = (6, 5, 4)


class Desk:
    """A studies folder with two scans, one of them labelled, and uploads that are about to come."""

    def __init__(self, root: Path) -> None:
        self.root, self.paths = root / "studies", Paths(SETTINGS, root / "studies")
        self.uploads = {value: root / f"label{value}.nii.gz" for value in (1, 2)}
        self.scan = root / "c.nii.gz"

    @classmethod
    def made(cls, root: Path) -> Desk:
        """In an empty folder."""
        desk = cls(root)
        for case in ("a", "b"):
            desk.write(desk.root / f"{case}.nii.gz", np.zeros(SHAPE, np.int16))
        for value, path in desk.uploads.items():
            desk.write(path, desk.drawn(value))
        desk.write(desk.scan, np.ones(SHAPE, np.int16))
        desk.save(1)
        return desk

    @staticmethod
    def drawn(value: int) -> np.ndarray:
        array = np.zeros(SHAPE, np.uint8)
        array[1, 2, 3] = value
        return array

    @staticmethod
    def write(path: Path, array: np.ndarray) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([-0.8, -0.8, 2.5, 1.0])), path)
        return path

    def open(self) -> StudiesDatastore:
        store = StudiesDatastore(str(self.root), SETTINGS, self.paths)
        store.flush()
        return store

    @contextmanager
    def opened(self) -> Iterator[StudiesDatastore]:
        """A store whose JSON is written at the end, as a server's thread does."""
        store = self.open()
        yield store
        store.flush()

    def save(self, value: int) -> None:
        """A label full of a value, by somebody called the same."""
        with self.opened() as store:
            store.save_label("a", str(self.uploads[value]), FINAL, {"user": f"user {value}"})

    def delete_label(self) -> None:
        with self.opened() as store:
            store.remove_label("a", FINAL, by="eve")

    def delete_scan(self) -> None:
        with self.opened() as store:
            store.remove_image("a", by="eve")

    def add_scan(self) -> None:
        with self.opened() as store:
            store.add_image("c", str(self.scan), {"user": "eve"})

    def state(self) -> tuple[list[str], int | None]:
        """The scans, and the value of the label of the first one, after all of it was checked."""
        store, ledger = self.open(), Ledger(self.paths.ledger)
        assert ledger.verify() is None
        ledger.require_whole()
        assert verify_label_files(self.paths) == []
        for path in self.root.rglob(".tmp-*"):
            os.utime(path, (1, 1))  # hours pass: a server might be writing them
        repair(self.paths)
        assert not list(self.root.rglob(".tmp-*"))
        scans = sorted(store.list_images())
        if "a" not in scans or FINAL not in store.get_labels_by_image_id("a"):
            return scans, None
        path, info = Path(store.get_label_uri("a", FINAL)), store.get_label_info("a", FINAL)
        value = int(np.asarray(nib.load(path).dataobj).max())
        assert info["user"] == f"user {value}", "the info of another label"
        assert info["sha256"] == sha256(path)
        return scans, value

    def kept(self, content: bytes) -> bool:
        """Whether these bytes lie anywhere in the folder, the trash and the parked uploads included."""
        return any(p.read_bytes() == content for p in self.root.rglob("*.nii.gz"))


BOTH = ["a", "b"]
ADDED = ["a", "b", "c"]
WORK: dict[str, tuple[Callable[[Desk], None], tuple, list[tuple], int]] = {
    # what is done, the state after it, the states in which a kill may leave it, and how many steps are tried
    "replace": (lambda desk: desk.save(2), (BOTH, 2), [(BOTH, 1), (BOTH, 2)], 16),
    "delete label": (Desk.delete_label, (BOTH, None), [(BOTH, 1), (BOTH, None)], 9),
    "delete scan": (Desk.delete_scan, (["b"], None), [(BOTH, 1), (BOTH, None), (["b"], None)], 12),
    "add scan": (Desk.add_scan, (ADDED, 1), [(BOTH, 1), (ADDED, 1)], 6),
}


@contextmanager
def in_this_process(_: ForkServer, job: dict[str, Any], __: float) -> Iterator[tuple[IO[bytes], str]]:
    """Reads an upload without a child: a fork for each step would start readers of its own, which takes long."""
    with tempfile.TemporaryFile() as file:
        untrusted.read_job(job, file)
        file.seek(0)
        yield file, ""


def wait_for_flush(behind: WriteBehind) -> None:
    """A request to write the JSON behind, which no thread does: each step has its number."""
    behind._requested = True


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ForkServer, "work", in_this_process)
        patched.setattr(WriteBehind, "request", wait_for_flush)
        yield Desk.made(tmp_path_factory.mktemp("desk")).root.parent


@pytest.fixture
def desk(template: Path, tmp_path: Path) -> Desk:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return Desk(tmp_path)


@pytest.mark.parametrize(("name", "step"), [(name, n) for name, (*_, most) in WORK.items() for n in range(1, most + 1)])
def test_killed_before_a_step(desk: Desk, name: str, step: int) -> None:
    work, after, allowed, _ = WORK[name]
    label = (desk.root / "labels" / FINAL / "a.nii.gz").read_bytes()
    killed = killed_in_fork(lambda: work(desk), step)
    assert killed or step > 2, "there are more steps than that"
    assert desk.state() in (allowed if killed else [after])
    assert desk.kept(label), "what was replaced or deleted is kept"
    # the client, which got no answer, tries again
    with suppress(RefusedError):  # a scan that was deleted already
        work(desk)
    assert desk.state() == after


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("step", range(1, 12, 2))
def test_the_disk_refuses_a_step(desk: Desk, step: int, number: int) -> None:
    work, after, allowed, _ = WORK["replace"]

    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    store = desk.open()
    said: list[str] = []
    with watched(at_number(step, refuse)):
        try:
            store.save_label("a", str(desk.uploads[2]), FINAL, {"user": "user 2"})
        except (AslsegError, OSError) as error:
            said.append(str(error))
    assert said or step > 2
    assert all(os.strerror(number) in text or "disk full" in text for text in said)
    assert desk.state() in (allowed if said else [after])
    work(desk)
    assert desk.state() == after


@pytest.mark.parametrize("seconds", [-86_400 * 400, -3600, 3600, 86_400 * 400])
def test_the_clock_jumps_between_two_saves(desk: Desk, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    now = time.time
    with monkeypatch.context() as moved:
        moved.setattr(time, "time", lambda: now() + seconds)
        desk.save(2)
    assert desk.state() == (BOTH, 2)
    desk.save(1)
    assert desk.state() == (BOTH, 1)
    events = Ledger(desk.paths.ledger).events(kinds=("saved",))
    assert [e.details["by"] for e in events] == ["user 1", "user 2", "user 1"]
