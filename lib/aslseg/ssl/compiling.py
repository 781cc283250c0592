"""torch.compile for the networks of a method, and the way back when the compiler fails."""

from __future__ import annotations

from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

ERRORS = (TorchDynamoException, InductorError)


def compile_networks(method: nn.Module) -> None:
    """Compile each network in place, at its first call; names in the state dict stay as they are."""
    for network in method.children():
        network.compile()


def to_eager(method: nn.Module) -> None:
    """Undo :func:`compile_networks`."""
    for network in method.children():
        network._compiled_call_impl = None


def reason(error: Exception) -> str:
    """The first line of what the compiler said."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
