"""Settings that are ``auto`` because what suits depends on the hardware, resolved in this one place."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from aslseg.settings import ResolvedSettings, Settings

logger = logging.getLogger(__name__)

# small enough for two CPU cores
ON_CPU: dict[str, Any] = {
    "network": "vnet_small",
    "patch_voxels": 2e5,
    "ssl_iterations": 2000,
    "retrain_iterations": 1500,
    "batch_labelled": 2,
    "batch_unlabelled": 2,
}
# the protocol of the SSL papers on the left atrium (docs/science.md §4)
ON_GPU: dict[str, Any] = {
    "network": "vnet",
    "patch_voxels": 112.0 * 112 * 80,
    "ssl_iterations": 6000,
    "retrain_iterations": 4500,
    "batch_labelled": 2,
    "batch_unlabelled": 2,
}
# BCP's batch (four labelled and four unlabelled patches), for GPUs that hold it with any of the networks
ON_LARGE_GPU = ON_GPU | {"batch_labelled": 4, "batch_unlabelled": 4}
LARGE_GPU_BYTES = 24e9


def resolved(settings: Settings) -> ResolvedSettings:
    """The settings with a value in place of each ``auto`` that depends on the hardware.

    Raises:
        BadSettingsError: ``device`` names a GPU that this machine does not have.
    """
    if isinstance(settings, ResolvedSettings):
        return settings
    open_ones = [name for name in ON_CPU if getattr(settings, name) == "auto"]
    chosen = {name: defaults(settings.device)[name] for name in open_ones}
    # without validation, which would turn the default 5 into 5.0 and so change the hash of a step
    return ResolvedSettings.model_construct(settings.model_fields_set, **(dict(settings) | chosen))


@cache
def defaults(device: str) -> dict[str, Any]:
    """Values for a setting ``device``; the first call for it writes them to the log."""
    values, where = ON_CPU, "a CPU"
    if device != "cpu":
        import torch

        from aslseg.compute.device import choose_device

        found = choose_device(Settings(device=device))
        if found.type == "cuda":
            properties = torch.cuda.get_device_properties(found)
            large = properties.total_memory >= LARGE_GPU_BYTES
            values, where = ON_LARGE_GPU if large else ON_GPU, properties.name
    logger.info("defaults on %s: %s", where, ", ".join(f"{k} {v}" for k, v in values.items()))
    return values
