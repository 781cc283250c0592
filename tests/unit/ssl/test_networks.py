"""Networks: any number of classes, the papers' V-Net, the names in published model files, the decoders of MC-Net+."""

from __future__ import annotations

import hashlib

import pytest
import torch

from aslseg.registry import NETWORKS
from aslseg.ssl.networks import VNet


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_take_any_number_of_classes(name):
    patch = (32, 16, 16)
    network = NETWORKS.get(name)(4, patch).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *patch)).shape == (1, 4, *patch)


@pytest.mark.parametrize("name", ["vnet", "vnet_small", "segresnet"])
def test_without_the_last_rectifier_features_of_the_head_keep_their_sign(name):
    patch, least = (32, 16, 16), {}
    for last_relu in (True, False):
        torch.manual_seed(0)
        network = NETWORKS.get(name)(3, patch, last_relu).eval()
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]
        head = next(m for m in reversed(convolutions) if m.out_channels == 3)
        head.register_forward_hook(lambda _, given, __, key=last_relu: least.update({key: given[0].min().item()}))
        with torch.no_grad():
            network(torch.randn(1, 1, *patch))
    assert least[True] == 0
    assert least[False] < 0


def test_decoders_beside_a_network_have_its_last_layer():
    network = VNet(3, filters=2, last_relu=False)
    assert isinstance(network.decoder_with("trilinear").decoder[0][-1], torch.nn.BatchNorm3d)


@pytest.mark.parametrize(
    ("name", "parameters", "names"),
    [("vnet", 9_448_866, "961573e9a708d84a"), ("vnet_small", 2_364_434, "44342bd63a66a097")],
)
def test_vnets_keep_their_size_and_the_names_of_published_files(name, parameters, names):
    network = NETWORKS.get(name)(2, (16,) * 3)
    assert sum(p.numel() for p in network.parameters()) == parameters
    listed = "\n".join(f"{key} {tuple(value.shape)}" for key, value in network.state_dict().items())
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == names


def test_the_papers_vnet_level_by_level():
    # 3 x 3 x 3 convolutions a level: 1, 2, 3, 3, 3 down and 3, 3, 2, 1 up, filters doubling from 16
    network = NETWORKS.get("vnet")(2, (16,) * 3).eval()
    convolutions = [sum(isinstance(m, torch.nn.Conv3d) for m in block) for block in network.encoder]
    assert convolutions == [1, 2, 3, 3, 3]
    assert [sum(isinstance(m, torch.nn.Conv3d) for m in block) for block in network.decoder] == [1, 2, 3, 3]
    with torch.no_grad():
        shapes = [tuple(f.shape[1:]) for f in network.encode(torch.zeros(1, 1, 32, 16, 16))]
    assert shapes == [(16, 32, 16, 16), (32, 16, 8, 8), (64, 8, 4, 4), (128, 4, 2, 2), (256, 2, 1, 1)]
    assert network.dropout.p == network.head_dropout.p == 0.5


def test_encoder_then_decoder_is_the_network():
    network = VNet(3, filters=2).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.decode(network.encode(x)), network(x))


def test_another_transposed_decoder_with_the_same_weights_is_the_same():
    network = VNet(3, filters=2).eval()
    other = network.decoder_with("transposed").eval()
    other.load_state_dict({k: v for k, v in network.state_dict().items() if k.startswith(("up.", "decoder.", "head."))})
    with torch.no_grad():
        features = network.encode(torch.randn(1, 1, 16, 16, 16))
        assert torch.equal(other(features), network.decode(features))


@pytest.mark.parametrize(
    ("up", "expected"),
    [("trilinear", [0, 1 / 3, 2 / 3, 1]), ("nearest", [0, 0, 1, 1])],
)
def test_interpolating_decoders_double_the_size_then_convolve(up, expected):
    network = VNet(2, filters=2, head_dropout=0.25)
    decoder = network.decoder_with(up)
    enlarge, convolve = decoder.up[0][0]
    ramp = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1, 1)
    assert enlarge(ramp)[0, 0, :, 0, 0].tolist() == pytest.approx(expected)
    assert convolve.weight.shape == (2, 4, 3, 3, 3)
    assert decoder.head_dropout.p == 0.25
    with torch.no_grad():
        assert decoder(network.encode(torch.zeros(1, 1, 32, 16, 16))).shape == (1, 2, 32, 16, 16)
