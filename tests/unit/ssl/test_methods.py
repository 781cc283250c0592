"""Every SSL method of the registry through the engine: deterministic, learns, resumes, reads no label it must not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aslseg.compute.augment import centre
from aslseg.compute.overlap import dice
from aslseg.compute.weights import load_weights
from aslseg.errors import BadSettingsError, BadWeightsError, NotEnoughCasesError, TrainingDivergedError
from aslseg.registry import NETWORKS, SSL_METHODS
from aslseg.settings import load_settings
from aslseg.ssl import engine, predict
from aslseg.ssl.networks import VNet

METHODS = list(SSL_METHODS)
DOCS = Path(__file__).resolve().parents[3] / "docs"


def tiny(classes, patch):
    """Sees a few voxels around each, which is enough for a bright blob."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 2, 2),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Dropout3d(0.1),
        nn.ConvTranspose3d(8, classes, 2, 2),
    )


def tiny_vnet(classes, patch):
    return VNet(classes, filters=4, dropout=0, head_dropout=0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for network in (tiny, tiny_vnet):
        monkeypatch.setitem(NETWORKS._entries, network.__name__, f"{__name__}:{network.__name__}")
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings_for(tiny_settings):
    def make(method: str, **changes: object):
        network = "tiny_vnet" if method == "mcnet" else "tiny"
        return tiny_settings(ssl_method=method, network=network, **changes)

    return make


def predicted(network: nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(centre(torch.from_numpy(image))[None, None])[0, :2].argmax(0).numpy() == 1


@pytest.mark.parametrize("method", METHODS)
def test_learns(method, make_case, settings_for):
    shape = (32, 32, 16)
    labelled, unlabelled = [make_case(n, shape=shape) for n in range(3)], [make_case(n, False, shape) for n in (3, 4)]
    steps = {"bcp": 90, "cps": 50}.get(method, 30)
    trainer = engine.Trainer(labelled, unlabelled, settings_for(method, learning_rate=0.05), steps)
    truth = make_case(9, shape=shape)
    fixed = trainer.batch(steps + 100)

    def look() -> tuple[float, float]:
        trainer.method.train()
        with torch.no_grad():
            loss, _ = trainer.method.loss(fixed, 1.0, torch.Generator().manual_seed(0))
        return loss.item(), dice(predicted(trainer.method.predictor, truth.image), truth.label == 1)

    loss, overlap = look()
    logs = [trainer.step(n) for n in range(steps)]
    assert all(np.isfinite(list(one.values())).all() for one in logs)
    trainer.refresh_statistics()
    trainer.method.eval()
    late_overlap = dice(predicted(trainer.method.predictor, truth.image), truth.label == 1)
    late_loss, _ = look()
    assert late_loss < 0.8 * loss
    assert late_overlap > max(0.6, overlap + 0.2)


@pytest.mark.parametrize("method", METHODS)
def test_is_deterministic_and_resumes_to_the_same_weights(method, make_case, settings_for, tmp_path, monkeypatch):
    settings = settings_for(method)
    labelled, unlabelled = [make_case(n) for n in range(2)], [make_case(2, False)]
    monkeypatch.setattr(engine, "CHECKPOINT_EVERY", 2)
    whole, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    engine.train(labelled, unlabelled, settings, whole, iterations=6, spacing=None)

    def interrupt(done: int, total: int, **_: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.train(labelled, unlabelled, settings, again, iterations=6, spacing=None, report=interrupt)
    assert not again.exists()
    resumed = engine.train(labelled, unlabelled, settings, again, iterations=6, spacing=None)
    assert resumed["steps"] == 2
    assert whole.read_bytes() == again.read_bytes()
    assert list(tmp_path.glob("*.pt")) == []


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_unlabelled_cases_are_never_read(method, make_case, settings_for, tmp_path):
    poisoned = make_case(2)
    poisoned.label[...] = 99
    out = []
    for n, case in enumerate((make_case(2, False), poisoned)):
        path = tmp_path / f"{n}.safetensors"
        engine.train([make_case(0), make_case(1)], [case], settings_for(method), path, iterations=3, spacing=None)
        out.append(path.read_bytes())
    assert out[0] == out[1]


@pytest.mark.parametrize("method", METHODS)
def test_without_unlabelled_cases_a_model_of_several_classes_is_published(method, make_case, settings_for, tmp_path):
    out = tmp_path / "m.safetensors"
    settings = settings_for(method, labels="blob,speck", consistency=0.3)
    case = make_case(0)
    case.label[4:8, 4:8, 4:8] = 2
    engine.train([case], [], settings, out, iterations=2, spacing=(1.0, 1.0, 1.0))
    model = predict.load(out, settings)
    assert model.spacing == (1.0, 1.0, 1.0)
    p = model.predict(make_case(1).image)
    assert p.shape == (3, 36, 34, 16)
    assert np.allclose(p.sum(0), 1, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_warm_start_begins_with_the_given_weights(method, make_case, settings_for, tmp_path):
    settings, path = settings_for(method), tmp_path / "a.safetensors"
    engine.train([make_case(0)], [], settings, path, iterations=1, spacing=None)
    trainer = engine.Trainer([make_case(0)], [], settings_for(method, seed=5), 5)
    state = load_weights(path, "ssl")[0]
    trainer.method.start_from(state)
    assert all(torch.equal(v, state[k]) for k, v in trainer.method.predictor.state_dict().items())


def test_nan_stops_with_advice(make_case, settings_for, tmp_path):
    settings = settings_for("supervised", learning_rate=1e30)
    with pytest.raises(TrainingDivergedError, match="learning_rate"):
        engine.train([make_case(0)], [], settings, tmp_path / "m.safetensors", iterations=30, spacing=None)
    assert not (tmp_path / "m.safetensors").exists()


def test_no_labelled_case(make_case, settings_for, tmp_path):
    settings = settings_for("mean_teacher")
    with pytest.raises(NotEnoughCasesError, match="label"):
        engine.train([], [make_case(0, False)], settings, tmp_path / "m", iterations=1, spacing=None)


def test_other_labels_are_refused(make_case, settings_for, tmp_path):
    out = tmp_path / "m.safetensors"
    engine.train([make_case(0)], [], settings_for("supervised"), out, iterations=1, spacing=None)
    with pytest.raises(BadWeightsError, match=r"trained for blob.*liver"):
        predict.load(out, load_settings({}, env={})[0])


def test_unknown_method_names_the_nearest():
    with pytest.raises(BadSettingsError, match="did you mean 'mean_teacher'"):
        load_settings({"ssl_method": "meanteacher"}, env={})


def test_the_documented_way_of_adding_a_method_works(make_case, settings_for, tmp_path, monkeypatch):
    text = (DOCS / "ssl.md").read_text(encoding="utf-8")
    (tmp_path / "pseudo_label.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    name, place = re.search(r'```\n"(\w+)": "aslseg\.ssl\.methods\.([\w:]+)",\n```', text).groups()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SSL_METHODS._entries, name, place)
    settings, out = settings_for(name), tmp_path / "m.safetensors"
    engine.train([make_case(0)], [make_case(1, False)], settings, out, iterations=3, spacing=None)
    assert predict.load(out, settings).metadata["method"] == "pseudo_label"


def test_every_method_is_documented():
    text = (DOCS / "ssl.md").read_text(encoding="utf-8")
    assert [m for m in METHODS if f"| `{m}` |" not in text] == []
