"""Two trainings for test_distributed.py: process 0 leads, process 1 helps; each writes its weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.weights import save_weights
from aslseg.settings import Settings
from aslseg.ssl import distributed, engine, worker
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

STEPS = 3


def settings() -> Settings:
    """No batch norm, two networks."""
    return Settings(
        labels="blob",
        network="unet",
        patch="32,32,16",
        batch_labelled=1,
        batch_unlabelled=1,
        accumulate=2,
        device="cpu",
        threads=1,
    )


def cases(folder: Path) -> tuple[list[Prepared], list[Prepared]]:
    """A human label and a promoted case in memory, and unlabelled cases on disk."""
    made = []
    for n in range(4):
        rng = np.random.default_rng(n)
        label = np.zeros((34, 33, 16), np.uint8)
        label[8:20, 10 : 24 - n, 4:12] = 1
        image = (0.3 + 0.3 * label + rng.normal(0, 0.1, label.shape)).astype(np.float32)
        file = folder / f"{n}.npy"
        if not file.exists():
            np.save(file, image)
        mapped = np.load(file, mmap_mode="r")
        grid = Grid.of(Volume(image, np.eye(4)), None)
        made.append(Prepared(str(n), str(n), mapped, grid, label if n < 2 else None))
    made[1] = replace(made[1], weight=0.5, voxel_weight=np.full(made[1].image.shape, 0.5, np.float16))
    return made[:2], made[2:]


def train(folder: Path, name: str) -> None:
    """One training of this process, or led by it."""
    engine.train(*cases(folder), settings(), folder / f"{name}.safetensors", iterations=STEPS, spacing=None)


def take_part(folder: Path, rank: int, port: int) -> None:
    """One of two processes, as torchrun starts them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, **address}.items():
        os.environ[name] = str(value)
    torch.set_num_threads(1)
    distributed.init(settings())
    if distributed.rank() == 0:
        for name in ("fresh", "resumed"):
            train(folder, name)
        worker.stop_workers()
        return
    for name, trainer in zip(("fresh", "resumed"), worker.help_train(), strict=True):
        save_weights(folder / f"{name}-helper.safetensors", trainer.method.predictor.state_dict(), {"kind": "ssl"})
