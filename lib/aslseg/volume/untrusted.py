"""Uploads, read in a child process with limited memory and time.

A few kilobytes can declare, and inflate to, many gigabytes. The size in the header is checked first and no reader
inflates more than the header declares (:mod:`aslseg.volume.stored`); the child is for what is left: a fault in a
decompressor costs the upload, not the server, and all memory goes back when it ends.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from aslseg.errors import AslsegError, BadImageError, BadLabelError
from aslseg.types import Volume
from aslseg.volume.container import open_volume, require_one_channel, require_size
from aslseg.volume.io import finite_image
from aslseg.volume.label_file import StoredLabel

MODULE = "aslseg.volume.untrusted"
INTERPRETER_BYTES = 6e8  # address space of Python with numpy and nibabel, most of it never used
BYTES_PER_VOXEL = 24  # stored number, voxel value and a copy of each on the way
LONGEST_REPLY = 4_000_000


@dataclass(frozen=True)
class Limits:
    """What reading an upload may cost.

    Attributes:
        voxels: More in the header are refused.
        seconds: After these the child is ended.
        setting: What the message calls the limit.
    """

    voxels: float
    seconds: float = 120.0
    setting: str = "max_upload_voxels"

    @property
    def memory_bytes(self) -> int:
        """Address space of the child."""
        return int(INTERPRETER_BYTES + BYTES_PER_VOXEL * self.voxels)


def read_untrusted(path: Path, limits: Limits) -> Volume:
    """Read an uploaded scan.

    Args:
        path: NIfTI, NRRD or MetaImage file with its voxels in it.
        limits: Voxels, memory and time.

    Returns:
        As :func:`aslseg.volume.io.read_image`.

    Raises:
        BadImageError: As :func:`aslseg.volume.io.read_image`, or more than the limits allow.
    """
    stored, notes = _read(path, limits, BadImageError)
    return finite_image(path.name, stored.layers[0].astype(np.float32, copy=False), stored.affine, notes)


def check_untrusted(path: Path, limits: Limits) -> None:
    """Read an uploaded scan and let its voxels go: is it one?

    Raises:
        BadImageError: As :func:`read_untrusted`.
    """
    read_untrusted(path, limits)


def read_untrusted_label(path: Path, limits: Limits) -> StoredLabel:
    """Read an uploaded label, for :func:`aslseg.volume.label_file.label_on_scan`.

    Raises:
        BadLabelError: Unreadable, or more than the limits allow.
    """
    return _read(path, limits, BadLabelError)[0]


def _read(path: Path, limits: Limits, error: type[AslsegError]) -> tuple[StoredLabel, tuple[str, ...]]:
    with _spare.take() as child:
        reason = child.run(path, limits, error)
        line = child.reply.readline(LONGEST_REPLY)
        if not line.endswith(b"\n"):
            raise error(
                f"{path.name}: cannot be read within the limits of an upload ({reason}); it is damaged or larger "
                "than it says. Export it again"
            )
        found = json.loads(line)
        if "error" in found:
            raise error(found["error"])
        array = np.fromfile(child.reply, np.dtype(found["dtype"])).reshape(found["shape"], order="F")
    return StoredLabel(array, np.array(found["affine"]), found["fields"]), tuple(found["notes"])


class _Child:
    """A child that has imported what it needs and waits for one upload; it ends with that, or with this process.

    Attributes:
        reply: What it wrote.
    """

    def __init__(self) -> None:
        library = str(Path(__file__).resolve().parents[2])
        # a thread pool of the linear algebra library would take address space for each core
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.reply = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=self.reply,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **single, "PYTHONPATH": library},
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def alive(self) -> bool:
        """Whether it still waits."""
        return self._process.poll() is None

    def run(self, path: Path, limits: Limits, error: type[AslsegError]) -> str:
        """Let it read a file and write its reply; returns how it ended."""
        job = [limits.memory_bytes, str(path.resolve()), limits.voxels, limits.setting, error.__name__]
        try:
            self._process.communicate(json.dumps(job).encode(), limits.seconds)
            reason = f"exit code {self._process.returncode}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self.reply.truncate(0)
            reason = f"more than {limits.seconds:g} s"
        self.reply.seek(0)
        return reason

    def close(self) -> None:
        """End it if it still runs."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self.reply.close()


class _Spare:
    """At most one child that waits: a server keeps one, because starting Python takes longer than reading a label."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._kept = False

    def keep(self) -> None:
        """From now on start a child ahead, whenever one is taken."""
        self._kept = True
        self._start()

    def take(self) -> _Child:
        """A child for one upload."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None and not child.alive():
            child.close()
            child = None
        if self._kept:
            threading.Thread(target=self._start, name="aslseg-spare-child", daemon=True).start()
        return child or _Child()

    def _start(self) -> None:
        with self._lock:
            if self._child is None:
                self._child = _Child()


_spare = _Spare()


def keep_child_ready() -> None:
    """Start the child of the next upload ahead, from now on; it waits, with some 100 MB, until there is one."""
    _spare.keep()


def _child(path: Path, voxels: float, setting: str, error: type[AslsegError], out: IO[bytes]) -> None:
    """Write one line of JSON, then the voxels."""
    try:
        with open_volume(path, error, alone=True) as stored:
            require_size(path.name, stored, voxels, error, setting)
            if error is BadImageError:
                require_one_channel(path.name, stored, error)
            array = stored.voxels()
    except AslsegError as problem:
        out.write(json.dumps({"error": str(problem)}).encode() + b"\n")
        return
    head: dict[str, Any] = {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "affine": stored.affine.tolist(),
        "fields": dict(stored.fields),
        "notes": stored.notes,
    }
    out.write(json.dumps(head).encode() + b"\n")
    out.write(array.ravel(order="F").data)


def main() -> None:
    """Entry of the child. Its job is most bytes, path, most voxels, name of that setting, name of the error."""
    text = sys.stdin.read()
    if not text:  # the server has ended, or needs no child any more
        return
    most, path, voxels, setting, error = json.loads(text)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    kinds = {kind.__name__: kind for kind in (BadImageError, BadLabelError)}
    _child(Path(path), voxels, setting, kinds[error], sys.stdout.buffer)


if __name__ == "__main__":
    main()
