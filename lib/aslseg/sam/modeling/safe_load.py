"""Reads PyTorch files without executing anything in them, even where they hold Python objects.

``torch.load(weights_only=True)`` builds tensors and plain containers, and refuses a file that names anything else. The
training files of SAM-Med2D do so: they hold the optimizer as an object beside the weights. Here each of these names is
bound to an empty placeholder, so that the file can be read; the named objects are never imported or called.
"""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from aslseg.errors import BadWeightsError

# exceptions that torch raises for damaged files
DAMAGED: tuple[type[Exception], ...] = (
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    OSError,
    LookupError,
    AttributeError,
    AssertionError,
)

_READING = threading.Lock()  # torch's list of allowed names belongs to the process


class Placeholder:
    """Takes the place of an object in a file; accepts any arguments and any state and keeps nothing."""

    def __new__(cls, *_: Any) -> Placeholder:
        """Accept any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}


def read_tensors(path: Path) -> tuple[Any, tuple[str, ...]]:
    """The content of a ``torch.save`` file, with placeholders for everything but tensors, containers and numbers.

    Tensors of files in PyTorch's zip format stay on disk until they are used. Files in the format from before 2020
    are refused where they hold objects, and all files where they name something of the modules ``os`` and ``sys``.

    Args:
        path: The file.

    Returns:
        The content, and the sorted names of the objects that were left out.

    Raises:
        BadWeightsError: Truncated, not a PyTorch file, or holding objects that cannot be left out.
    """
    try:
        zipped = _is_zip(path)
        with _READING:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if zipped else []
            # a default dictionary is filled in place; torch fills nothing but real dictionaries
            placeholders: list[Any] = [
                (_dictionary if n == "collections.defaultdict" else Placeholder, n) for n in names
            ]
            with torch.serialization.safe_globals(placeholders):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), tuple(names)
    except UnpicklingError:
        raise BadWeightsError(
            f"{path.name}: holds Python objects beside its weights, or is damaged; nothing in it was executed. "
            "Save its state dict alone (torch.save(model.state_dict(), ...)) or copy the file again"
        ) from None
    except DAMAGED as error:
        first = (str(error).strip().splitlines() or [""])[0][:120]
        raise BadWeightsError(
            f"{path.name}: cannot be read ({first or type(error).__name__}); it is truncated or not a PyTorch file. "
            "Copy or download it again"
        ) from None


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
