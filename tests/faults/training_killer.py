"""Runs a training in a process of its own and kills it, without any warning, at a chosen point; imported there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.settings import Settings
from aslseg.ssl import engine
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

STEPS = 9
EVERY = 2


def tiny_case(seed: int, labelled: bool = True) -> Prepared:
    """A bright box in noise, (33, 32, 16)."""
    rng = np.random.default_rng(seed)
    label = np.zeros((33, 32, 16), np.uint8)
    label[8:20, 10:24, 4:12] = 1
    image = (0.3 + 0.3 * label + rng.normal(0, 0.1, label.shape)).astype(np.float32)
    return Prepared(str(seed), str(seed), image, Grid.of(Volume(image, np.eye(4)), None), label if labelled else None)


def tiny_settings() -> Settings:
    """Mean Teacher, so that there are two networks to bring back."""
    return Settings(
        labels="blob", network="unet", patch="32,32,16", batch_labelled=1, batch_unlabelled=1, training_memory_gb=0.01
    )


def die() -> None:
    """As by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(out: Path, point: str, number: int) -> None:
    """Train, and die at the ``number``-th (from 1) time that ``point`` is reached.

    Args:
        out: Model file.
        point: ``step`` (between two steps), ``half`` (the temporary file is half written), ``before`` (it is complete
            and not yet renamed), ``after`` (just renamed), or ``never``.
        number: Which time.
    """
    torch.set_num_threads(1)
    engine.CHECKPOINT_EVERY = EVERY
    engine.STATISTICS_BATCHES = 2
    replace, save = os.replace, torch.save
    seen = dict.fromkeys(("step", "half", "before", "after"), 0)

    def reached(name: str) -> bool:
        seen[name] += 1
        return name == point and seen[name] == number

    def replacing(source: Any, target: Any) -> None:
        if reached("before"):
            die()
        replace(source, target)
        if reached("after"):
            die()

    def saving(content: Any, path: Path) -> None:
        save(content, path)
        if reached("half"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    def report(done: int, total: int, **_: Any) -> None:
        if reached("step"):
            die()

    os.replace, torch.save = replacing, saving  # type: ignore[assignment]
    cases = [tiny_case(n) for n in range(2)], [tiny_case(n, False) for n in range(2, 4)]
    engine.train(*cases, tiny_settings(), out, iterations=STEPS, spacing=None, report=report)
