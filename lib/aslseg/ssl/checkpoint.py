"""Checkpoints of a training run: written atomically, read only by a run with the same inputs."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from aslseg.cases.prepared_case import Prepared, arrays, backing_file
from aslseg.files import atomic_file
from aslseg.settings import Settings, relevant

logger = logging.getLogger(__name__)


def fingerprint(
    metadata: dict[str, Any],
    settings: Settings,
    state: dict[str, Any],
    labelled: Sequence[Prepared],
    unlabelled: Sequence[Prepared],
) -> str:
    """Hash of everything that the result of a training depends on.

    Args:
        metadata: What the model file will say about itself.
        settings: Those that the SSL training depends on count (:func:`aslseg.settings.relevant`). The effect of others,
            such as iterations and weights of promoted cases, is in the other arguments.
        state: The method's state dict; its shapes tell one version of a network from another.
        labelled, unlabelled: With the content of their arrays.
    """
    shapes = [[name, list(value.shape)] for name, value in state.items()]
    cases = [
        [[c.id, c.weight, {k: _content(a) for k, a in arrays(c).items()}] for c in stream]
        for stream in (labelled, unlabelled)
    ]
    text = json.dumps([metadata, relevant(settings, "ssl"), shapes, cases], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(array: np.ndarray) -> list[Any]:
    file = backing_file(array)
    if file is not None:
        # the store names its files by the hash of what they were made from
        return [list(array.shape), file.name]
    return [list(array.shape), zlib.crc32(np.ascontiguousarray(array).data)]


def write(path: Path, step: int, owner: str, state: dict[str, Any]) -> None:
    """Write a checkpoint: a process killed at any point leaves the old or the new one, whole.

    Args:
        path: ``*.checkpoint.pt``.
        step: Steps done.
        owner: :func:`fingerprint` of the run.
        state: ``Trainer.state()``.
    """
    with atomic_file(path) as temporary:
        torch.save({"step": step, "fingerprint": owner, **state}, temporary)


def read(path: Path, owner: str, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint of a run; None if there is none, it belongs to other inputs, or it is damaged."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        theirs = content["fingerprint"]
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError, OSError, UnpicklingError) as error:
        logger.warning("%s is damaged (%s); starting afresh", path.name, type(error).__name__)
        return None
    if theirs != owner:
        logger.info("%s belongs to other inputs; starting afresh", path.name)
        return None
    return content
