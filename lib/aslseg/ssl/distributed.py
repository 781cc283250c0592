"""One training in several processes: torchrun starts them, process 0 leads, the others are its workers.

A step averages the gradients of ``accumulate`` batches, numbered through the run; process r of w takes the r-th,
(r + w)-th, ... of each step. So all processes hold the same weights at every step, and the result is that of one
process with the same settings, up to the order in which numbers are added. Batch norm works, as in gradient
accumulation, on each batch separately; its running statistics are averaged with the gradients.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from aslseg.cases.prepared_case import Prepared, arrays, backing_file
from aslseg.errors import BadSettingsError
from aslseg.settings import Settings
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

logger = logging.getLogger(__name__)

# workers do nothing while process 0 prepares cases, predicts or trains SAM
TIMEOUT = timedelta(days=7)


def rank() -> int:
    """Number of this process, 0 for the leading or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init(settings: Settings) -> None:
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs.

    Raises:
        BadSettingsError: The batches of a step cannot be shared out.
    """
    processes = int(os.environ["WORLD_SIZE"])
    if settings.accumulate % processes:
        raise BadSettingsError(
            f"accumulate is {settings.accumulate}, but {processes} processes share the batches of a step; "
            f"give --conf accumulate {processes}, or a multiple of it"
        )
    if torch.cuda.is_available() and settings.device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    logger.info("process %d of %d", rank() + 1, world())


def close() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace tensors (same shapes in all processes) by their sums over the processes, in float32."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([t.detach().flatten().float() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the processes."""
    all_reduce_sum(tensors)
    if world() > 1:
        for tensor in tensors:
            tensor.div_(world())


def mean_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Means of named numbers over the processes; the names are the same in all of them."""
    if world() == 1:
        return numbers
    values = torch.tensor([numbers[name] for name in sorted(numbers)], dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(sorted(numbers), (values / world()).tolist(), strict=True))


def broadcast(message: Any = None) -> Any:
    """Send a JSON message from process 0 to all; the others call it without an argument and get the message."""
    text = json.dumps(message).encode() if rank() == 0 else b""
    length = torch.tensor([len(text)])
    dist.broadcast(length, 0)
    data = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == 0:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


@contextmanager
def with_workers(
    labelled: Sequence[Prepared],
    unlabelled: Sequence[Prepared],
    settings: Settings,
    folder: Path,
    **job: Any,
) -> Iterator[None]:
    """Let the other processes take part in a training; without others this does nothing.

    Args:
        labelled, unlabelled, settings: Of the run.
        folder: Holds, for the time of the training, files of the arrays that only process 0 has in memory.
        job: Further arguments of :func:`aslseg.ssl.worker.help_train`.
    """
    if world() == 1:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        streams = {"labelled": labelled, "unlabelled": unlabelled}
        cases = {s: [_packed(c, folder / f"{s}{n}") for n, c in enumerate(of)] for s, of in streams.items()}
        broadcast({"settings": settings.model_dump(), **cases, **job})
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _packed(case: Prepared, path: Path) -> dict[str, Any]:
    files = {}
    for name, array in arrays(case).items():
        files[name] = str(backing_file(array) or f"{path}.{name}.npy")
        if backing_file(array) is None:
            np.save(files[name], array)
    about = {"id": case.id, "patient": case.patient, "weight": case.weight, "relative": case.relative}
    return about | {"spacing": list(case.grid.spacing), "files": files}


def unpacked(packed: dict[str, Any]) -> Prepared:
    """A case as process 0 sent it, memory-mapped; of its grid, training uses the spacing only."""
    volumes = {name: np.load(file, mmap_mode="r") for name, file in packed["files"].items()}
    grid = Grid.of(Volume(volumes["image"], np.diag([*packed["spacing"], 1.0])), None)
    about = {name: packed[name] for name in ("id", "patient", "weight", "relative")}
    return Prepared(grid=grid, **about, **volumes)
