"""The child that reads uploads may be started ahead: it serves one upload, and ends with its server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aslseg.errors import BadImageError, BadLabelError
from aslseg.volume import untrusted
from aslseg.volume.untrusted import Limits, read_untrusted, read_untrusted_label

LIMITS = Limits(1000)


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[untrusted._Spare]:
    kept = untrusted._Spare()
    monkeypatch.setattr(untrusted, "_spare", kept)
    untrusted.keep_child_ready()
    yield kept
    kept._kept = False
    with kept._lock:
        if kept._child is not None:
            kept._child.close()


@pytest.fixture
def label(tmp_path: Path) -> Path:
    nib.save(nib.Nifti1Image(np.ones((4, 3, 2), np.uint8), np.eye(4)), tmp_path / "label.nii.gz")
    return tmp_path / "label.nii.gz"


def waiting(spare: untrusted._Spare) -> subprocess.Popen:
    """The process that waits, once it has been started."""
    while True:
        with spare._lock:
            if spare._child is not None:
                return spare._child._process
        time.sleep(0.01)


def test_each_upload_has_a_child_of_its_own(spare: untrusted._Spare, label: Path) -> None:
    first = waiting(spare)
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24
    assert first.returncode == 0
    second = waiting(spare)
    assert second.pid != first.pid
    with pytest.raises(BadLabelError, match="voxels"):
        read_untrusted_label(label, Limits(10))
    with pytest.raises(BadImageError, match="not an image"):
        read_untrusted(label.with_name("notes.txt"), LIMITS)


def test_a_child_that_died_while_it_waited_is_replaced(spare: untrusted._Spare, label: Path) -> None:
    process = waiting(spare)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert read_untrusted_label(label, LIMITS).layers.sum() == 24


def test_the_time_limit_ends_the_child(spare: untrusted._Spare, label: Path) -> None:
    process = waiting(spare)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(BadLabelError, match=r"more than 0\.2 s"):
        read_untrusted_label(label, Limits(1000, seconds=0.2))
    assert process.returncode == -signal.SIGKILL


OWNER = """
import os
from aslseg.volume import untrusted
untrusted.keep_child_ready()
print(untrusted._spare._child._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_waiting_child_ends_with_its_server() -> None:
    done = subprocess.run([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, timeout=300, check=False)
    pid = int(done.stdout)
    end = time.monotonic() + 120
    while running(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
