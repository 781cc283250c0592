"""Uploads are read in children of a process of its own: each is alone, limited, and ends with its server."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
import pytest

from aslseg.errors import AslsegError, BadImageError, BadLabelError, DiskFullError, NoResourcesError
from aslseg.volume import fork_server, untrusted
from aslseg.volume.fork_server import ForkServer
from aslseg.volume.untrusted import Limits, check_untrusted, read_untrusted, read_untrusted_label, start_readers

LIMITS = Limits(1000)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    own = ForkServer("aslseg.volume.untrusted")
    monkeypatch.setattr(untrusted, "_readers", own)
    yield own
    own.stop()


@pytest.fixture
def label(tmp_path: Path) -> Path:
    return written(tmp_path / "label.nii.gz", 1)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A file that never ends and never begins: whoever opens it waits."""
    os.mkfifo(tmp_path / "endless.nii.gz")
    return tmp_path / "endless.nii.gz"


def written(path: Path, value: int) -> Path:
    nib.save(nib.Nifti1Image(np.full((4, 3, 2), value, np.uint8), np.eye(4)), path)
    return path


def process(readers: ForkServer) -> subprocess.Popen:
    assert readers._process is not None
    return readers._process


def children(readers: ForkServer) -> list[int]:
    pid = process(readers).pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def child(readers: ForkServer) -> int:
    """The child that reads now, once it has begun."""
    while not (found := children(readers)):
        time.sleep(0.01)
    return found[0]


def written_to(pipe: Path) -> int:
    """A descriptor for writing to a pipe, as soon as its reader has opened it."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        time.sleep(0.01)


def test_no_upload_starts_an_interpreter_and_none_meets_another(readers: ForkServer, label: Path) -> None:
    start_readers()
    first = process(readers)
    for _ in range(3):
        assert read_untrusted_label(label, LIMITS).layers.sum() == 24
        with pytest.raises(BadLabelError, match="voxels"):
            read_untrusted_label(label, Limits(10))
        with pytest.raises(BadImageError, match="not an image"):
            read_untrusted(label.with_name("notes.txt"), LIMITS)
        assert children(readers) == [], "each child ends with its upload"
    assert process(readers) is first


def test_a_child_inherits_no_file_of_another_upload(readers: ForkServer, label: Path, endless: Path) -> None:
    start_readers()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read_untrusted_label, endless, Limits(1000, seconds=20))
        one = child(readers)
        read_untrusted_label(label, LIMITS)
        opened = written_to(endless)
        kinds = {os.readlink(f"/proc/{one}/fd/{n.name}") for n in Path(f"/proc/{one}/fd").iterdir()}
        assert sum("deleted" in kind for kind in kinds) == 1, "only the file for its own answer"
        assert not [kind for kind in kinds if kind.startswith("socket")], "no way to the server or to other uploads"
        os.kill(one, signal.SIGKILL)
        os.close(opened)
        with pytest.raises(BadLabelError, match="exit code -9"):
            waiting.result(60)


def test_uploads_of_several_clients_at_once(readers: ForkServer, tmp_path: Path) -> None:
    paths = [written(tmp_path / f"label{n}.nii.gz", n + 1) for n in range(4)]

    def upload(n: int) -> bool:
        return bool((read_untrusted_label(paths[n % 4], LIMITS).layers == n % 4 + 1).all())

    with ThreadPoolExecutor(4) as clients:
        assert all(clients.map(upload, range(40)))
    assert children(readers) == []


def test_a_slow_upload_keeps_no_other_waiting(readers: ForkServer, label: Path, endless: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(read_untrusted_label, endless, Limits(1000, seconds=60))
        start_readers()
        one = child(readers)
        assert read_untrusted_label(label, LIMITS).layers.sum() == 24
        assert not slow.done()
        os.kill(one, signal.SIGKILL)
        with pytest.raises(BadLabelError, match="exit code -9"):
            slow.result(60)


def test_a_child_at_its_memory_limit_costs_the_upload_only(
    readers: ForkServer, label: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as small:
        small.setattr(untrusted, "INTERPRETER_BYTES", 0)
        small.setattr(untrusted, "BYTES_PER_VOXEL", 0)
        with pytest.raises(BadLabelError, match="not enough memory"):
            read_untrusted_label(label, LIMITS)
    before = process(readers)
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24
    assert process(readers) is before


def test_a_process_that_was_killed_is_replaced(readers: ForkServer, label: Path) -> None:
    start_readers()
    for _ in range(2):
        old = process(readers)
        os.kill(old.pid, signal.SIGKILL)
        assert read_untrusted_label(label, LIMITS).layers.sum() == 24
        assert process(readers).pid != old.pid


def test_a_process_killed_in_the_middle_of_an_upload(readers: ForkServer, label: Path, endless: Path) -> None:
    start_readers()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read_untrusted_label, endless, Limits(1000, seconds=60))
        for _ in range(2):
            one, old = child(readers), process(readers)
            os.kill(old.pid, signal.SIGKILL)
            old.wait()
            os.kill(one, signal.SIGKILL)
            while process(readers) is old and not waiting.done():
                time.sleep(0.01)
        with pytest.raises(BadLabelError, match="exit code -9"):
            waiting.result(60)
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24


def test_the_time_limit_ends_the_child(readers: ForkServer, label: Path, endless: Path) -> None:
    start_readers()
    with pytest.raises(BadLabelError, match=r"more than 0\.3 s"):
        read_untrusted_label(endless, Limits(1000, seconds=0.3))
    assert children(readers) == []


def test_a_process_that_hangs_is_replaced(readers: ForkServer, label: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_untrusted_label(label, LIMITS)
    monkeypatch.setattr(fork_server, "KILL_SECONDS", 0.2)
    hanging = process(readers)
    os.kill(hanging.pid, signal.SIGSTOP)
    with pytest.raises(BadLabelError, match=r"more than 0\.2 s"):
        read_untrusted_label(label, Limits(1000, seconds=0.2))
    assert hanging.wait(60) == -signal.SIGKILL
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24


def test_a_fork_of_the_server_has_readers_of_its_own(label: Path) -> None:
    """Also where another thread was just about to read, as it holds the lock."""
    read_untrusted_label(label, LIMITS)
    theirs = process(untrusted._readers).pid
    with untrusted._readers._lock:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                good = read_untrusted_label(label, LIMITS).layers.sum() == 24
                code = 0 if good and process(untrusted._readers).pid != theirs else 2
                untrusted._readers.stop()
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24
    assert process(untrusted._readers).pid == theirs


def test_children_wait_for_a_place(
    readers: ForkServer, label: Path, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers._places = threading.Semaphore(1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read_untrusted_label, endless, Limits(1000, seconds=60))
        start_readers()
        one = child(readers)
        second = pool.submit(read_untrusted_label, label, LIMITS)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        assert children(readers) == [one]
        os.kill(one, signal.SIGKILL)
        with pytest.raises(BadLabelError, match="exit code -9"):
            first.result(60)
        assert second.result(60).layers.sum() == 24


def test_nobody_waits_for_a_place_for_ever(
    readers: ForkServer, label: Path, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "WAIT_SECONDS", 0.1)
    readers._places = threading.Semaphore(1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(read_untrusted_label, endless, Limits(1000, seconds=60))
        start_readers()
        one = child(readers)
        with pytest.raises(NoResourcesError, match="reads 4 other files, and none was done"):
            read_untrusted_label(label, LIMITS)
        os.kill(one, signal.SIGKILL)
        with pytest.raises(BadLabelError, match="exit code -9"):
            first.result(60)
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24, "its place is free again"


def test_many_uploads_at_once_do_not_take_all_threads_of_the_server(
    readers: ForkServer, label: Path, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "CHILDREN", 1)
    monkeypatch.setattr(fork_server, "MOST_WAITING", 2)
    readers._forget()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(read_untrusted_label, endless, Limits(1000, seconds=60))
        start_readers()
        one = child(readers)
        waiting = [pool.submit(read_untrusted_label, label, LIMITS) for _ in range(2)]
        while readers._queue._value:  # until both wait; taking a place to find out would take it from one of them
            time.sleep(0.01)
        with pytest.raises(NoResourcesError, match="2 more wait; send it again later"):
            read_untrusted_label(label, LIMITS)
        os.kill(one, signal.SIGKILL)
        with pytest.raises(BadLabelError, match="exit code -9"):
            first.result(60)
        assert [w.result(60).layers.sum() for w in waiting] == [24, 24]
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24, "all places are free again"


def test_a_check_brings_no_voxels_back(readers: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    answer = readers._answer

    def measured(file: IO[bytes], *rest: Any) -> str:
        reason = answer(file, *rest)
        sizes.append(os.fstat(file.fileno()).st_size)
        return reason

    monkeypatch.setattr(readers, "_answer", measured)
    scan, empty = tmp_path / "scan.nii", tmp_path / "nan.nii"
    nib.save(nib.Nifti1Image(np.zeros((32, 32, 32), np.float32), np.eye(4)), scan)
    nib.save(nib.Nifti1Image(np.full((3, 3, 3), np.nan, np.float32), np.eye(4)), empty)
    check_untrusted(scan, Limits(1e6))
    with pytest.raises(BadImageError, match="27 voxels are NaN"):
        check_untrusted(empty, Limits(1e6))
    assert max(sizes) < 1000


FAILING = """
import errno, os, sys
from aslseg.volume import fork_server

def work(job, out):
    raise OSError(job["errno"], "of the machine")

def no_fork():
    raise OSError(errno.EAGAIN, "no process left")

if __name__ == "__main__":
    if os.environ.get("NO_FORK"):
        os.fork = no_fork
    fork_server.serve(work)
"""


@pytest.mark.parametrize(
    ("number", "fork", "kind", "match"),
    [
        (errno.ENOSPC, True, DiskFullError, "TMPDIR"),
        (errno.EDQUOT, True, DiskFullError, "TMPDIR"),
        (errno.EMFILE, True, NoResourcesError, "send it again later"),
        (0, False, NoResourcesError, "send it again later"),
    ],
)
def test_troubles_of_the_server_are_not_the_uploads(
    label: Path, monkeypatch: pytest.MonkeyPatch, number: int, fork: bool, kind: type[AslsegError], match: str
) -> None:
    """A process as the readers' own, whose children, or whose forks, fail."""
    label.with_name("failing.py").write_text(FAILING)
    if not fork:
        monkeypatch.setenv("NO_FORK", "1")
    failing = ForkServer("failing")
    start = subprocess.Popen

    def started(command: list[str], **more: Any) -> subprocess.Popen:
        more["env"]["PYTHONPATH"] += f"{os.pathsep}{label.parent}"
        return start(command, **more)

    monkeypatch.setattr(fork_server.subprocess, "Popen", started)
    with pytest.raises(kind, match=match), failing.work({"errno": number}, 60):
        pass
    failing.stop()


def test_no_folder_for_temporary_files(label: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server.tempfile, "tempdir", str(label.with_name("absent")))
    with pytest.raises(NoResourcesError, match="TMPDIR"):
        read_untrusted_label(label, LIMITS)


OWNER = """
import os, sys, threading, time
from pathlib import Path
from aslseg.volume import untrusted
untrusted.start_readers()
job = (Path(sys.argv[1]), untrusted.Limits(1000))
threading.Thread(target=untrusted.read_untrusted_label, args=job, daemon=True).start()
pid = untrusted._readers._process.pid
while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
    time.sleep(0.01)
print(pid, *found, flush=True)
os.kill(os.getpid(), 9)
"""


def test_all_end_with_a_server_that_is_killed(endless: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(endless)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    end = time.monotonic() + 120
    while any(map(running, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_leaves_no_thread_and_no_descriptor(readers: ForkServer, label: Path) -> None:
    read_untrusted_label(label, LIMITS)
    gc.collect()  # what earlier tests have left would otherwise be closed meanwhile
    files, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    for _ in range(20):
        read_untrusted_label(label, LIMITS)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert set(threading.enumerate()) <= threads
