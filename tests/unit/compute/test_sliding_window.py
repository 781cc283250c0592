"""Sliding windows: where they lie, how they blend, what is tried when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from aslseg.compute.sliding_window import Plan, out_of_memory, plans, slabs, starts

CPU = torch.device("cpu")
WINDOW = (32, 32, 16)


def network(window: Tensor) -> Tensor:
    """Two channels that depend on the voxel, its neighbours and its place in the window."""
    smooth = nn.functional.avg_pool3d(window, 3, 1, 1)
    ramp = torch.linspace(0, 1, window.shape[2]).view(1, 1, -1, 1, 1)
    p = torch.sigmoid(4 * window - 2 * smooth + ramp)
    return torch.cat([1 - p, p], 1)


def assembled(image: np.ndarray, plan: Plan, overlap: float, blend: str) -> np.ndarray:
    out = np.full((2, *image.shape), np.nan, np.float32)
    for where, found in slabs(image, network, 2, plan, overlap, blend):
        assert np.isnan(out[:, *where]).all()
        out[:, *where] = found.numpy()
    return out


def test_windows_end_where_the_axis_ends():
    assert starts(90, 32, 0.25) == [0, 24, 48, 58]
    assert starts(80, 32, 0.25) == [0, 24, 48]
    assert starts(32, 32, 0.5) == [0]
    assert starts(34, 32, 0.99) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(70, 40, 30), (33, 75, 16), (40, 40, 60), (20, 45, 9), (32, 32, 16)])
@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_same_as_monai(shape, overlap, blend):
    image = np.random.default_rng(0).random(shape, np.float32)
    expected = sliding_window_inference(torch.from_numpy(image)[None, None], WINDOW, 4, network, overlap, mode=blend)
    out = assembled(image, Plan(CPU, WINDOW, 3), overlap, blend)
    assert np.allclose(out, expected[0].numpy(), atol=1e-6)


def test_windows_of_one_value_are_predicted_once():
    image = np.zeros((96, 32, 16), np.float32)
    image[:8] = np.random.default_rng(0).random((8, 32, 16))
    seen: list[int] = []

    def counted(window: Tensor) -> Tensor:
        seen.extend(float(w.std()) > 0 for w in window)
        return network(window)

    found = list(slabs(image, counted, 2, Plan(CPU, WINDOW, 2), 0.5))
    # five windows: one with texture, four of zeros; each goes through as a batch of two, the least on a CPU
    assert sorted(seen) == [False, False, True, True]
    out = np.concatenate([p.numpy() for _, p in found], 1)
    expected = sliding_window_inference(torch.from_numpy(image)[None, None], WINDOW, 4, network, 0.5, mode="gaussian")
    assert np.allclose(out, expected[0].numpy(), atol=1e-6)


def test_a_cpu_never_gets_a_batch_of_one():
    batches: list[int] = []

    def counted(window: Tensor) -> Tensor:
        batches.append(len(window))
        return network(window)

    image = np.random.default_rng(0).random((32, 128, 64), np.float32)
    list(slabs(image, counted, 2, Plan(CPU, WINDOW, 3), 0.0))
    assert batches == [2, 2] * 4
    batches.clear()
    list(slabs(image[:, :32, :16], counted, 2, Plan(CPU, WINDOW, 3), 0.0))
    assert batches == [2]


def test_what_is_tried_on_a_cpu():
    tried = [(p.window, p.batch) for p in plans(CPU, (64, 112, 48))]
    assert tried == [
        ((64, 112, 48), 3),
        ((64, 112, 48), 2),
        ((64, 48, 48), 2),
        ((32, 48, 48), 2),
        ((32, 32, 48), 2),
        ((32, 32, 16), 2),
    ]


def test_what_is_tried_on_a_gpu_ends_on_the_cpu():
    tried = [(p.device.type, p.window, p.batch) for p in plans(torch.device("cuda:0"), (48, 32, 16))]
    assert tried == [
        ("cuda", (48, 32, 16), 4),
        ("cuda", (48, 32, 16), 2),
        ("cuda", (48, 32, 16), 1),
        ("cuda", (32, 32, 16), 1),
        ("cpu", (48, 32, 16), 3),
        ("cpu", (48, 32, 16), 2),
        ("cpu", (32, 32, 16), 2),
    ]


def test_which_errors_mean_that_memory_ran_out():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))


def test_torch_really_says_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)
