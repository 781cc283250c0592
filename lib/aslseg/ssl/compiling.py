"""torch.compile for the networks of a method, and how to undo it when the compiler fails."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

ERRORS = (TorchDynamoException, InductorError)


# methods of a V-Net that SSL methods call instead of the whole network
PARTS = ("encode", "decode")


def compile_networks(method: nn.Module) -> None:
    """Compile each network and its parts in place, at their first call; names in the state dict stay as they are."""
    for network in _networks(method):
        network.compile()
        for part in PARTS:
            if hasattr(network, part):
                setattr(network, part, torch.compile(getattr(network, part)))


def to_eager(method: nn.Module) -> None:
    """Undo :func:`compile_networks`."""
    for network in _networks(method):
        network._compiled_call_impl = None
        for part in PARTS:
            network.__dict__.pop(part, None)


def _networks(method: nn.Module) -> Iterator[nn.Module]:
    for child in method.children():
        yield from child if isinstance(child, nn.ModuleList) else [child]


def reason(error: Exception) -> str:
    """The first line of the compiler's message."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
