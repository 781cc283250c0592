"""Model files: safetensors with JSON metadata, written atomically; reading one executes nothing in it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aslseg.errors import BadWeightsError
from aslseg.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a state dict with its metadata.

    Args:
        path: ``*.safetensors``.
        state: Names to tensors; shared storage is copied.
        metadata: JSON-serialisable; must hold ``kind`` (``ssl``, ``sam`` or ``adapter``).
    """
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"aslseg": json.dumps(metadata, sort_keys=True)})


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a model file, without torch.

    Raises:
        BadWeightsError: The file does not exist or is no ASLseg model file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 50_000_000:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        return json.loads(header["__metadata__"]["aslseg"])
    except FileNotFoundError:
        raise BadWeightsError(f"{path} does not exist; train it or give another file") from None
    except (ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise BadWeightsError(
            f"{path.name} is not an ASLseg model file ({type(error).__name__}); restore or retrain it"
        ) from None


def load_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a model file.

    Raises:
        BadWeightsError: The file is damaged, or holds a model of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    if metadata.get("kind") != kind:
        raise BadWeightsError(f"{path.name} holds a {metadata.get('kind')!r} model, expected {kind!r}")
    try:
        return load_file(path), metadata
    except SafetensorError as error:
        raise BadWeightsError(f"{path.name} is damaged ({error}); restore or retrain it") from None
