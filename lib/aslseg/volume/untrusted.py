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
    with tempfile.TemporaryFile() as reply:
        reason = _run_child(path, limits, error, reply)
        reply.seek(0)
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


def _run_child(path: Path, limits: Limits, error: type[AslsegError], reply: IO[bytes]) -> str:
    """Let the child write its reply; returns how it ended."""
    library = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", MODULE, str(path.resolve()), str(limits.voxels), limits.setting, error.__name__]
    # a thread pool of the linear algebra library would take address space for each core
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **single, "PYTHONPATH": library, "ASLSEG_CHILD_BYTES": str(limits.memory_bytes)}
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, stdout=reply, stderr=subprocess.DEVNULL, env=environment, timeout=limits.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        reply.truncate(0)
        return f"more than {limits.seconds:g} s"
    return f"exit code {done.returncode}"


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


def main(arguments: list[str]) -> None:
    """Entry of the child: path, most voxels, name of that setting, name of the error."""
    most = int(os.environ["ASLSEG_CHILD_BYTES"])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    path, voxels, setting, error = arguments
    kinds = {kind.__name__: kind for kind in (BadImageError, BadLabelError)}
    _child(Path(path), float(voxels), setting, kinds[error], sys.stdout.buffer)


if __name__ == "__main__":
    main(sys.argv[1:])
