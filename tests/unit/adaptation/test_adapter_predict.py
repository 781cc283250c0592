"""Prediction with the adaptation network: where it looks, what it never gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from aslseg.adaptation.network import AdaptationNetwork
from aslseg.adaptation.predict import AdapterModel, load
from aslseg.adaptation.train import crop
from aslseg.compute.augment import centre
from aslseg.compute.overlap import dice
from aslseg.compute.weights import save_weights
from aslseg.errors import BadWeightsError
from aslseg.settings import Settings

METADATA = {
    "kind": "adapter",
    "labels": ["liver", "tumour"],
    "strides": [[2, 2, 2]] * 3,
    "patch": [32, 32, 16],
}


@pytest.fixture
def network() -> AdaptationNetwork:
    torch.manual_seed(1)
    made = AdaptationNetwork(2, METADATA["strides"])
    torch.nn.init.normal_(made.head.weight, std=0.1)
    return made


@pytest.fixture
def model(network: AdaptationNetwork, settings: Settings) -> AdapterModel:
    return AdapterModel(network, METADATA, settings)


def volume(shape: tuple[int, int, int] = (50, 44, 20)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    sam, ssl = np.zeros((2, 2, *shape), np.float32)
    middle = tuple(slice(n // 2 - 3, n // 2 + 3) for n in shape)
    sam[:, *middle] = 0.9
    ssl[:1, *middle] = 0.8
    return rng.random(shape, np.float32), sam, ssl


def test_shape_range_and_repeatability(model: AdapterModel) -> None:
    image, sam, ssl = volume()
    out = model.predict(image, sam, ssl)
    assert out.shape == sam.shape
    assert out.dtype == np.float32
    assert 0 <= out.min() < out.max() <= 1
    assert np.array_equal(out, model.predict(image, sam, ssl))


def test_far_from_any_foreground_everything_is_zero(model: AdapterModel) -> None:
    image, sam, ssl = volume((120, 44, 20))
    out = model.predict(image, sam, ssl)
    assert out[:, 50:70].any(axis=(2, 3)).all()
    assert not out[:, :40].any()
    assert not out[:, 80:].any()
    assert not model.predict(image, 0 * sam, 0 * ssl).any()


def test_what_only_one_input_found_is_looked_at(model: AdapterModel) -> None:
    image, sam, ssl = volume()
    assert model.predict(image, 0 * sam, ssl).any()
    assert model.predict(image, sam, 0 * ssl).any()


def test_as_monai_blends_windows_but_never_one_at_a_time(model: AdapterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    image, sam, ssl = volume((80, 70, 40))
    sam[:, 20:60, 20:50, 10:30] = 0.9
    box = model._box(sam, ssl)
    inputs = torch.from_numpy(np.concatenate([image[None], sam, ssl])[:, *box])[None]
    with torch.inference_mode():
        logits = sliding_window_inference(inputs, (32, 32, 16), 1, model._logits, model.settings.overlap, "gaussian")
    ask, batches = model._logits, []
    monkeypatch.setattr(model, "_logits", lambda windows: (batches.append(len(windows)), ask(windows))[1])
    found = model.predict(image, sam, ssl)
    # torch does without oneDNN for a batch of one on a CPU, which takes three times as long
    assert min(batches) > 1
    for region in range(2):
        assert dice(found[region, *box] >= 0.5, logits[0, region].numpy() >= 0) > 0.999
    assert np.allclose(found[:, *box], torch.sigmoid(logits[0]).numpy(), atol=2e-3)


@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 20, 40), (1, 40, 40), (32, 32, 16)])
def test_any_size_of_volume(model: AdapterModel, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    given = rng.random((2, *shape), np.float32)
    out = model.predict(rng.random(shape, np.float32), given, given)
    assert out.shape == (2, *shape)
    assert np.isfinite(out).all()


def test_a_volume_smaller_than_a_window_is_surrounded_by_air_as_in_training(model: AdapterModel) -> None:
    image, sam, ssl = volume((20, 32, 16))
    given = np.concatenate([image[None], sam, ssl])
    padded = crop(given, np.array([-6, 0, 0]), (32, 32, 16))
    assert not padded[0, :6].any()
    padded[:1] = centre(torch.from_numpy(padded[:1])).numpy()
    with torch.inference_mode():
        expected = torch.sigmoid(model.network(torch.from_numpy(padded)[None].repeat(2, 1, 1, 1, 1)))[0, :, 6:-6]
    # where bfloat16 pays, predictions are made in it
    np.testing.assert_allclose(model.predict(image, sam, ssl), expected.numpy(), atol=5e-3)


def test_never_nan(model: AdapterModel) -> None:
    image, sam, ssl = volume()
    sam[0, 25, 22, 10] = np.nan
    ssl[1, 25, 22, 11] = np.inf
    image[24, 22, 10] = np.nan
    assert np.isfinite(model.predict(image, sam, ssl)).all()


def test_a_read_only_image_and_half_precision_inputs_will_do(model: AdapterModel) -> None:
    image, sam, ssl = volume()
    image.flags.writeable = False
    out = model.predict(image, sam.astype(np.float16), ssl)
    assert out.dtype == np.float32


def test_wrong_shapes_are_refused(model: AdapterModel) -> None:
    image, sam, ssl = volume()
    with pytest.raises(ValueError, match="expected regions of shape"):
        model.predict(image, sam[:1], ssl)
    with pytest.raises(ValueError, match="expected regions of shape"):
        model.predict(image[1:], sam, ssl)


def test_a_saved_network_predicts_the_same(
    model: AdapterModel, network: AdaptationNetwork, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_weights(path, network.state_dict(), METADATA)
    again = load(path, settings)
    assert again.metadata == METADATA
    assert np.array_equal(again.predict(*volume()), model.predict(*volume()))


def test_files_that_do_not_fit_are_refused(network: AdaptationNetwork, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_weights(path, network.state_dict(), METADATA | {"labels": ["atrium", "scar"]})
    with pytest.raises(BadWeightsError, match="trained for atrium, scar"):
        load(path, settings)
    save_weights(path, network.state_dict(), METADATA | {"kind": "ssl"})
    with pytest.raises(BadWeightsError, match="expected 'adapter'"):
        load(path, settings)
    state = network.state_dict()
    del state["kappa"]
    save_weights(path, state, METADATA)
    with pytest.raises(BadWeightsError, match="does not fit"):
        load(path, settings)
    with pytest.raises(BadWeightsError, match="does not exist"):
        load(tmp_path / "none.safetensors", settings)
