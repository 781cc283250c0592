"""What ``auto`` becomes on a CPU and on GPUs of two sizes; the GPUs are stand-ins for torch's answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from aslseg.compute import hardware
from aslseg.compute.device import choose_device
from aslseg.compute.hardware import resolved
from aslseg.errors import BadSettingsError
from aslseg.settings import ResolvedSettings, Settings


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    hardware.defaults.cache_clear()
    yield
    hardware.defaults.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def with_memory(gigabytes: float) -> None:
        properties = SimpleNamespace(total_memory=gigabytes * 1e9, name="some GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gigabytes > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gigabytes > 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return with_memory


def chosen(settings: Settings) -> list[object]:
    found = resolved(settings)
    return [found.network, found.ssl_iterations, found.retrain_iterations, found.batch_labelled, found.batch_unlabelled]


def test_a_cpu_gets_the_small_network(gpu: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gpu(0)
    assert chosen(Settings()) == ["vnet_small", 2000, 1500, 2, 2]
    assert "defaults on a CPU: network vnet_small" in caplog.text
    gpu(80)
    assert chosen(Settings(device="cpu")) == ["vnet_small", 2000, 1500, 2, 2]


def test_gpus_get_the_papers_protocol(gpu: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gpu(12)
    assert chosen(Settings()) == ["vnet", 6000, 4500, 2, 2]
    assert "defaults on some GPU: network vnet" in caplog.text
    hardware.defaults.cache_clear()
    gpu(80)
    assert chosen(Settings(device="cuda:0")) == ["vnet", 6000, 4500, 4, 4]
    assert resolved(Settings()).patch_voxels == 112 * 112 * 80


def test_what_is_set_stays(gpu: Callable[[float], None]) -> None:
    gpu(80)
    settings = Settings(network="unet", batch_unlabelled=0, sam_zoom=3)
    assert chosen(settings) == ["unet", 6000, 4500, 4, 0]
    found = resolved(settings)
    assert isinstance(found, ResolvedSettings)
    assert found.model_fields_set == settings.model_fields_set
    assert resolved(found) is found
    changed = {k for k, v in found.model_dump().items() if v != settings.model_dump()[k]}
    assert changed == {"ssl_iterations", "retrain_iterations", "batch_labelled", "patch_voxels"}


def test_a_gpu_that_is_not_there(gpu: Callable[[float], None]) -> None:
    gpu(0)
    with pytest.raises(
        BadSettingsError, match="finds 0 GPUs on this machine, but cuda is asked for; set device to cpu"
    ):
        choose_device(Settings(device="cuda"))
    gpu(80)
    with pytest.raises(BadSettingsError, match=r"finds 1 GPUs .* set device to auto"):
        resolved(Settings(device="cuda:1"))
    assert choose_device(Settings(device="cuda")).type == "cuda"
