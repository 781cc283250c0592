"""Which device computes, and in which precision."""

from __future__ import annotations

import torch

from aslseg.errors import BadSettingsError
from aslseg.settings import Settings


def choose_device(settings: Settings) -> torch.device:
    """The device of the setting ``device``; ``auto`` takes a GPU where there is one, each process its own.

    Raises:
        BadSettingsError: A GPU that this machine does not have, or that torch cannot use.
    """
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, count = torch.device(settings.device), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BadSettingsError(
            f"device: torch finds {count} GPUs on this machine, but {settings.device} is asked for; set device to "
            f"{'auto' if count else 'cpu'}, or install the driver that torch {torch.__version__} needs"
        )
    return device


def bfloat16_pays(device: torch.device) -> bool:
    """Whether bf16 autocast is supported in hardware (AMX or AVX512-BF16 on CPUs, Ampere or later on GPUs)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
