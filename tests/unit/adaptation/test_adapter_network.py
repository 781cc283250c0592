"""The adaptation network: shapes, the gated residual, size."""

from __future__ import annotations

import pytest
import torch

from aslseg.adaptation.network import KAPPA, AdaptationNetwork, strides_for


def inputs(regions: int = 2, shape: tuple[int, ...] = (16, 24, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 1 + 2 * regions, *shape, generator=generator)


@pytest.mark.parametrize("regions", [1, 2, 3])
def test_one_logit_per_region_and_fewer_than_half_a_million_parameters(regions: int) -> None:
    network = AdaptationNetwork(regions)
    assert network(inputs(regions)).shape == (2, regions, 16, 24, 8)
    assert network(inputs(regions)).dtype == torch.float32
    assert sum(p.numel() for p in network.parameters()) < 500_000


def test_untrained_it_decides_as_the_mean_logit_of_its_inputs() -> None:
    x = inputs()
    logits = AdaptationNetwork(2)(x)
    given = torch.logit(x[:, 1:], eps=1e-3).clamp(-4, 4)
    torch.testing.assert_close(logits, KAPPA * (given[:, :2] + given[:, 2:]))


def test_kappa_gates_each_input_of_each_region() -> None:
    network = AdaptationNetwork(2)
    with torch.no_grad():
        network.kappa.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    x = inputs()
    logits = network(x)
    assert not logits[:, 0].any()
    torch.testing.assert_close(logits[:, 1], torch.logit(x[:, 2], eps=1e-3).clamp(-4, 4))


def test_certain_inputs_have_bounded_logits() -> None:
    x = inputs().round()
    network = AdaptationNetwork(2)
    torch.nn.init.ones_(network.kappa)
    assert network(x).abs().max() <= 8


def test_gradient_reaches_every_parameter_after_the_first_step() -> None:
    network = AdaptationNetwork(2)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        network(inputs()).square().mean().backward()
        optimiser.step()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias before an instance norm has no effect
    assert [n for n in without if not n.endswith("conv.bias")] == []


def test_thick_slices_are_halved_later() -> None:
    assert strides_for((1.25, 1.25, 1.25)) == [[2, 2, 2]] * 3
    assert strides_for((2.0, 2.0, 5.0)) == [[2, 2, 1], [2, 2, 2], [2, 2, 2]]
    assert strides_for((1.0, 1.0, 8.0)) == [[2, 2, 1]] * 3
    assert AdaptationNetwork(2, strides_for((1.0, 1.0, 8.0)))(inputs()).shape == (2, 2, 16, 24, 8)
