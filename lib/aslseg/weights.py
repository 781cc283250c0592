"""Model files: safetensors with JSON metadata, written atomically, hashed; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aslseg.errors import BadWeightsError

if TYPE_CHECKING:
    from torch import Tensor


# the umask can only be read by setting it, which two threads must not do at once
_UMASK = threading.Lock()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success fsync it and rename it to ``path``.

    The folder is made if missing. On any failure the temporary file is removed and ``path`` is as before.
    The temporary name keeps the extension and starts with a dot, so that a datastore does not list it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    suffix = name[name.index(".", 1) :] if "." in name[1:] else ""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # mkstemp is private to the user; a studies folder is often shared by a group
        with _UMASK:
            umask = os.umask(0o077)
            os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        BadWeightsError: Not a safetensors file of ours.
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
        BadWeightsError: Damaged, or a model of another kind.
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
