"""Prediction of volumes: folded networks, flips, uncertainty, shortage of memory, memory that is used."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aslseg.compute.augment import centre
from aslseg.compute.fuse_batch_norm import fuse_batch_norm
from aslseg.compute.sliding_window import Plan
from aslseg.errors import NotEnoughMemoryError
from aslseg.registry import NETWORKS
from aslseg.ssl import predict
from aslseg.ssl.predict import SSLModel, entropy

PATCH = (32, 32, 16)


@pytest.fixture
def make_model(tiny_settings):
    def make(network: nn.Module, patch: tuple[int, int, int] = PATCH, **changes: object) -> SSLModel:
        settings = tiny_settings(**{"overlap": 0.25, "device": "cpu", **changes})
        metadata = {"labels": list(settings.label_set.names), "patch": list(patch), "spacing": None}
        return SSLModel(network, metadata, settings)

    return make


def trained(name: str, classes: int = 2) -> nn.Module:
    """A network whose batch norms have seen something."""
    torch.manual_seed(0)
    network = NETWORKS.get(name)(classes, PATCH)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return network.eval()


def volume(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape, np.float32)


class Hungry(nn.Module):
    """Fails as torch does for inputs of more than ``most`` voxels."""

    def __init__(self, most: float, error: Exception | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.most = most
        self.error = error or RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 GB")

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.most:
            raise self.error
        return self.conv(x)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_folding_changes_nothing(name):
    network = trained(name)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randn(2, 1, *PATCH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(fuse_batch_norm(network)(x), network(x), atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_nothing_is_left_of_the_vnets_batch_norm():
    assert any(isinstance(m, nn.BatchNorm3d) for m in trained("vnet_small").modules())
    assert not any(isinstance(m, nn.BatchNorm3d) for m in fuse_batch_norm(trained("vnet_small")).modules())


@pytest.fixture
def in_float32(monkeypatch):
    """Predictions as on a processor without bf16."""
    monkeypatch.setattr(predict, "bfloat16_pays", lambda device: False)


def test_probabilities_of_a_single_window(make_model, in_float32):
    network, image = trained("vnet_small"), volume(*PATCH)
    with torch.inference_mode():
        expected = network(centre(torch.from_numpy(image))[None, None]).softmax(1)[0].numpy()
    out = make_model(network).predict(image)
    assert out.shape == (2, *PATCH)
    assert out.dtype == np.float32
    assert np.allclose(out, expected, atol=1e-5)


def test_bfloat16_says_the_same(make_model, monkeypatch):
    network, image = trained("vnet_small"), volume(*PATCH)
    found = {}
    for bf16 in (False, True):
        monkeypatch.setattr(predict, "bfloat16_pays", lambda device, bf16=bf16: bf16)
        found[bf16] = make_model(network).predict(image)
    assert not np.array_equal(found[True], found[False])
    assert np.allclose(found[True], found[False], atol=0.02)
    assert np.allclose(found[True].sum(0), 1, atol=1e-5)


def test_outputs_after_the_classes_are_dropped(make_model, in_float32):
    network, image = trained("vnet_small", 4), volume(*PATCH)
    with torch.inference_mode():
        expected = network(centre(torch.from_numpy(image))[None, None])[:, :2].softmax(1)[0].numpy()
    assert np.allclose(make_model(network).predict(image), expected, atol=1e-5)


def test_flips_are_averaged(make_model):
    network, image = trained("vnet_small"), volume(*PATCH)
    plain = make_model(network)
    i, j = plain.predict(image[::-1])[:, ::-1], plain.predict(image[:, ::-1])[:, :, ::-1]
    mean = (plain.predict(image) + i + j) / 3
    assert not np.allclose(mean, plain.predict(image), atol=1e-3)
    assert np.allclose(make_model(network, flips=True).predict(image), mean, atol=1e-5)


def test_regions_are_those_of_the_probabilities(make_model):
    model = make_model(trained("vnet_small", 3), labels="liver,tumour")
    image = volume(50, 40, 20)
    expected = model.settings.label_set.region_probabilities(model.predict(image))
    assert np.array_equal(model.regions(image), expected)


def test_a_memory_map_is_not_written_to(make_model, tmp_path):
    np.save(tmp_path / "scan.npy", volume(40, 32, 16))
    model = make_model(trained("vnet_small"))
    out = model.predict(np.load(tmp_path / "scan.npy", mmap_mode="r"))
    assert np.array_equal(out, model.predict(volume(40, 32, 16)))


def test_entropy_over_its_largest_value():
    p = torch.tensor([[1.0, 0.5, 0.9], [0.0, 0.5, 0.1]])
    two = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    assert entropy(p).tolist() == pytest.approx([0, 1, two], abs=1e-5)
    assert entropy(torch.full((4, 1), 0.25)).item() == pytest.approx(1, abs=1e-5)


def test_uncertainty_belongs_to_the_averaged_probabilities(make_model):
    model = make_model(trained("vnet_small"), flips=True)
    found = model.run(volume(40, 34, 20), uncertainty=True)
    assert found.uncertainty.shape == (40, 34, 20)
    assert np.allclose(found.uncertainty, entropy(torch.from_numpy(found.values)).numpy(), atol=1e-6)
    assert model.run(volume(40, 34, 20)).uncertainty is None


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_smaller_windows_when_memory_runs_out(make_model, caplog, error):
    network = Hungry(2 * 32 * 32 * 32, error)
    image = volume(70, 60, 40)
    with caplog.at_level(logging.WARNING, "aslseg"):
        found = make_model(network, (64, 32, 32)).run(image)
    network.most = np.inf
    assert np.allclose(found.values, make_model(network, (32, 32, 32)).predict(image), atol=1e-6)
    assert not np.allclose(found.values, make_model(network, (64, 32, 32)).predict(image), atol=1e-4)
    assert found.notes == (
        "memory ran out with 3 windows of 64 x 32 x 32 at once on cpu; "
        "went on with 2 windows of 64 x 32 x 32 at once on cpu",
        "memory ran out with 2 windows of 64 x 32 x 32 at once on cpu; "
        "went on with 2 windows of 32 x 32 x 32 at once on cpu",
    )
    assert [r.message for r in caplog.records] == list(found.notes)


def test_smaller_batches_come_first(make_model):
    found = make_model(Hungry(2 * 32 * 32 * 16), PATCH).run(volume(32, 96, 40))
    assert len(found.notes) == 1
    assert found.notes[0].endswith("went on with 2 windows of 32 x 32 x 16 at once on cpu")


def test_enough_memory_leaves_no_note(make_model):
    assert make_model(Hungry(np.inf)).run(volume(40, 40, 20)).notes == ()


def test_no_memory_at_all(make_model):
    with pytest.raises(NotEnoughMemoryError, match=r"40 x 40 x 20 voxels.*32 x 32 x 16.*coarser spacing"):
        make_model(Hungry(0), (48, 48, 32)).run(volume(40, 40, 20))


def test_other_errors_are_not_hidden(make_model):
    with pytest.raises(RuntimeError, match="shapes"):
        make_model(Hungry(0, RuntimeError("shapes cannot be multiplied"))).run(volume(40, 40, 20))


def test_another_device_goes_on_when_one_is_full(make_model, monkeypatch):
    """To torch cpu:0 is another device than cpu, and so stands in for what follows a GPU."""
    model, image = make_model(Hungry(2 * 32 * 32 * 16)), volume(40, 40, 20)
    first, second = Plan(torch.device("cpu"), PATCH, 4), Plan(torch.device("cpu:0"), PATCH, 2)
    monkeypatch.setattr(predict, "plans", lambda device, window: iter((first, second)))
    found = model.run(image)
    assert found.notes == (f"memory ran out with {first}; went on with 2 windows of 32 x 32 x 16 at once on cpu:0",)
    model.network.most = np.inf
    assert np.allclose(found.values, model.predict(image), atol=1e-6)


MEMORY = """
import json, resource, sys
import numpy as np, torch
from aslseg.settings import load_settings
from aslseg.ssl.predict import SSLModel
from aslseg.types import Volume

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
shape, whole = json.loads(sys.argv[1]), sys.argv[2] == "whole"
settings, _ = load_settings({"overlap": "0", "labels": "liver,tumour", "spacing": "native", "device": "cpu"}, env={})
metadata = {"labels": ["liver", "tumour"], "patch": [64, 64, 48], "spacing": None}
model = SSLModel(torch.nn.Conv3d(1, 3, 1), metadata, settings)
model.run(np.random.default_rng(0).random((64, 64, 96), np.float32), uncertainty=True)
scan = np.zeros(shape, np.float32)
# windows of a single value are predicted once: some with texture take as much memory as all of them, and less time
scan[:96:3, :96:2] = np.random.default_rng(0).random(shape[2], np.float32)
before = peak()
if whole:
    from aslseg.models.cascade import Cascade
    mask = Cascade({"ssl": model}, settings).masks(Volume(400 * scan - 160, np.eye(4)))["ssl"]
    assert mask.shape == tuple(shape)
else:
    found = model.run(scan, uncertainty=True)
    assert np.isfinite(found.values).all()
print(json.dumps([before, peak()]))
"""


def peaks(shape: tuple[int, int, int], what: str) -> tuple[int, int]:
    """Peak resident bytes of a process before and after it predicted a scan."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(list(shape)), what], capture_output=True, text=True, check=True
    )
    before, after = np.array(done.stdout.strip("[] \n").split(","), np.int64)
    return int(before), int(after)


def test_memory_is_the_result_and_a_slab():
    shape = (160, 160, 480)
    before, after = peaks(shape, "run")
    result = 4 * (3 + 1) * math.prod(shape)
    # sums, their shifted copy, and the finished slab with what its entropy takes
    slab = 4 * (3 + 1) * 160 * 160 * 48
    assert after - before < result + 6 * slab + 30e6


@pytest.mark.slow
def test_a_scan_of_512_x_512_x_800_takes_less_than_8_gb():
    assert peaks((512, 512, 800), "whole")[1] < 8e9
