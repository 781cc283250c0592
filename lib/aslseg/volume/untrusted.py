"""Uploads, read in a child process with limited memory and time.

A few kilobytes can declare, and inflate to, many gigabytes. The size in the header is checked first and no reader
inflates more than the header declares (:mod:`aslseg.volume.stored`); the child is for what is left: a fault in a
decompressor costs the upload, not the server, and all memory goes back when it ends. Each upload has a child of its
own, forked from a process that has imported the readers (:mod:`aslseg.volume.fork_server`).
"""

from __future__ import annotations

import json
import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from aslseg.errors import AslsegError, BadImageError, BadLabelError
from aslseg.types import Volume
from aslseg.volume.container import open_volume, require_one_channel, require_size, say_once
from aslseg.volume.fork_server import ForkServer, serve
from aslseg.volume.io import finite_image
from aslseg.volume.label_file import StoredLabel

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
    """Is an uploaded scan one? Its voxels are looked at where they are read and do not come back.

    Raises:
        BadImageError: As :func:`read_untrusted`.
    """
    for note in _read(path, limits, BadImageError, check=True)[1]:
        say_once(f"{path.name}: {note}")


def read_untrusted_label(path: Path, limits: Limits) -> StoredLabel:
    """Read an uploaded label, for :func:`aslseg.volume.label_file.label_on_scan`.

    Raises:
        BadLabelError: Unreadable, or more than the limits allow.
    """
    return _read(path, limits, BadLabelError)[0]


def _read(
    path: Path, limits: Limits, error: type[AslsegError], check: bool = False
) -> tuple[StoredLabel, tuple[str, ...]]:
    """What the child has read, and what is unusual about it; with ``check`` the layers are empty."""
    job = {
        "path": str(path.resolve()),
        "voxels": limits.voxels,
        "memory": limits.memory_bytes,
        "seconds": limits.seconds,
        "setting": limits.setting,
        "error": error.__name__,
        "check": check,
    }
    with _readers.work(job, limits.seconds) as (reply, reason):
        line = reply.readline(LONGEST_REPLY)
        if not line.endswith(b"\n"):
            raise error(
                f"{path.name}: cannot be read within the limits of an upload ({reason}); it is damaged or larger "
                "than it says. Export it again"
            )
        found = json.loads(line)
        if "error" in found:
            raise error(found["error"])
        array = np.fromfile(reply, np.dtype(found["dtype"])).reshape(found["shape"], order="F")
    return StoredLabel(array, np.array(found["affine"]), found["fields"]), tuple(found["notes"])


_readers = ForkServer("aslseg.volume.untrusted")
os.register_at_fork(after_in_child=_readers.forget)


def start_readers() -> None:
    """Start the process that reads uploads ahead, so that the first one does not wait; it takes some 60 MB."""
    _readers.start()


def read_job(job: dict[str, Any], out: IO[bytes]) -> None:
    """What a child does: read a file, then write one line of JSON and its voxels."""
    error = {kind.__name__: kind for kind in (BadImageError, BadLabelError)}[job["error"]]
    path = Path(job["path"])
    try:
        with open_volume(path, error, alone=True) as stored:
            require_size(path.name, stored, job["voxels"], error, job["setting"])
            if error is BadImageError:
                require_one_channel(path.name, stored, error)
            array = stored.voxels()
            if job["check"]:
                finite_image(path.name, array[0].astype(np.float32, copy=False), stored.affine, ())
                array = array[:0]
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


def _limited(job: dict[str, Any], out: IO[bytes]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    # the time limit is kept by the server; this one ends a child whose server and parent were both killed
    seconds = math.ceil(job["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    read_job(job, out)


if __name__ == "__main__":
    # OpenBLAS takes its memory at the first use, and where there is none it tries for ever
    np.linalg.det(np.eye(3))
    serve(_limited)
