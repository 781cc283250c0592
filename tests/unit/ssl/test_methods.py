"""Every SSL method on blobs: finite, deterministic, learns, resumes to the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aslseg.agreement.measures import dice
from aslseg.errors import BadSettingsError, BadWeightsError, NotEnoughCasesError, TrainingDivergedError
from aslseg.registry import NETWORKS, SSL_METHODS
from aslseg.settings import load_settings
from aslseg.ssl import engine, predict
from aslseg.ssl.methods.bcp import copy_paste_mask, largest_components
from aslseg.weights import load_weights

METHODS = list(SSL_METHODS)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_learns_deterministically_and_resumes(method, make_case, tiny_settings, tmp_path, monkeypatch):
    settings = tiny_settings(ssl_method=method)
    labelled, unlabelled = [make_case(n) for n in range(3)], [make_case(n, False) for n in range(3, 6)]
    losses: list[float] = []
    result = engine.train(
        labelled,
        unlabelled,
        settings,
        tmp_path / "a.safetensors",
        iterations=60,
        spacing=None,
        report=lambda done, total, loss: losses.append(loss),
    )
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    truth = make_case(9)
    model = predict.load(tmp_path / "a.safetensors", settings)
    assert dice(model.predict(truth.image).argmax(0) == 1, truth.label == 1) > 0.5

    monkeypatch.setattr(engine, "CHECKPOINT_EVERY", 20)

    def interrupt(done: int, total: int, **_: float) -> None:
        if done == 50:
            raise KeyboardInterrupt

    again = tmp_path / "b.safetensors"
    with pytest.raises(KeyboardInterrupt):
        engine.train(labelled, unlabelled, settings, again, iterations=60, spacing=None, report=interrupt)
    assert not again.exists()
    resumed = engine.train(labelled, unlabelled, settings, again, iterations=60, spacing=None)
    assert resumed["steps"] == 20
    first, second = load_weights(tmp_path / "a.safetensors", "ssl")[0], load_weights(again, "ssl")[0]
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert result["sha256"] == resumed["sha256"]
    assert list(tmp_path.glob("*.pt")) == []


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_unlabelled_cases_are_never_read(method, make_case, tiny_settings, tmp_path):
    settings = tiny_settings(ssl_method=method)
    labelled = [make_case(0), make_case(1)]
    poisoned = make_case(2)
    poisoned.label[...] = 99
    out = []
    for n, case in enumerate((make_case(2, False), poisoned)):
        engine.train(labelled, [case], settings, tmp_path / f"{n}.safetensors", iterations=4, spacing=None)
        out.append((tmp_path / f"{n}.safetensors").read_bytes())
    assert out[0] == out[1]


@pytest.mark.parametrize("method", METHODS)
def test_works_without_unlabelled_cases(method, make_case, tiny_settings, tmp_path):
    out = tmp_path / "m.safetensors"
    settings = tiny_settings(ssl_method=method)
    engine.train([make_case(0)], [], settings, out, iterations=40, spacing=(1.0, 1.0, 1.0))
    model = predict.load(out, settings)
    assert model.spacing == (1.0, 1.0, 1.0)
    p = model.predict(make_case(1).image)
    assert p.shape == (2, 36, 34, 16)
    assert np.allclose(p.sum(0), 1, atol=1e-3)


@pytest.mark.parametrize("method", ["mean_teacher", "bcp"])
def test_no_gradient_reaches_the_teacher(method, make_case, tiny_settings):
    trainer = engine.Trainer([make_case(0), make_case(1)], [make_case(2, False)], tiny_settings(ssl_method=method), 10)
    loss, _ = trainer.method.loss(trainer.batch(5), 0.9, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is None for p in trainer.method.teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.method.student.parameters())


def test_warm_start_begins_with_the_given_weights(make_case, tiny_settings, tmp_path):
    settings = tiny_settings()
    engine.train([make_case(0)], [], settings, tmp_path / "a.safetensors", iterations=3, spacing=None)
    trainer = engine.Trainer([make_case(0)], [], settings, 5)
    state = load_weights(tmp_path / "a.safetensors", "ssl")[0]
    trainer.method.start_from(state)
    for network in (trainer.method.student, trainer.method.teacher):
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_collapse_to_the_empty_mask_is_noticed(tiny_settings):
    n = engine.COLLAPSE_WINDOW
    with pytest.raises(TrainingDivergedError, match=r"collapsed.*consistency"):
        engine._check_collapse([0.0] * n, [0.1] * n, 0.6, tiny_settings())
    engine._check_collapse([0.0] * n, [0.1] * n, 0.4, tiny_settings())
    engine._check_collapse([0.08] * n, [0.1] * n, 0.6, tiny_settings())
    engine._check_collapse([0.0] * n, [0.0] * n, 0.6, tiny_settings())


def test_nan_stops_with_advice(make_case, tiny_settings, tmp_path):
    settings = tiny_settings(learning_rate=1e30)
    with pytest.raises(TrainingDivergedError, match="learning_rate"):
        engine.train([make_case(0)], [], settings, tmp_path / "m.safetensors", iterations=30, spacing=None)
    assert not (tmp_path / "m.safetensors").exists()


def test_no_labelled_case(make_case, tiny_settings, tmp_path):
    with pytest.raises(NotEnoughCasesError, match="label"):
        engine.train([], [make_case(0, False)], tiny_settings(), tmp_path / "m", iterations=1, spacing=None)


def test_other_labels_are_refused(make_case, tiny_settings, tmp_path):
    out = tmp_path / "m.safetensors"
    engine.train([make_case(0)], [], tiny_settings(), out, iterations=1, spacing=None)
    with pytest.raises(BadWeightsError, match=r"trained for blob.*liver"):
        predict.load(out, load_settings({}, env={})[0])


def test_unknown_method_names_the_nearest():
    with pytest.raises(BadSettingsError, match="did you mean 'mean_teacher'"):
        load_settings({"ssl_method": "meanteacher"}, env={})


def test_copy_paste_mask_is_a_box_of_two_thirds():
    mask = copy_paste_mask(torch.Size((12, 9, 6)), torch.Generator().manual_seed(1))
    assert (mask == 0).sum().item() == 8 * 6 * 4


def test_largest_components_per_class():
    maps = torch.zeros(1, 6, 1, 1, dtype=torch.long)
    maps[0, :, 0, 0] = torch.tensor([1, 1, 0, 1, 2, 2])
    assert largest_components(maps)[0, :, 0, 0].tolist() == [1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_take_any_number_of_classes(name):
    patch = (32, 16, 16)
    network = NETWORKS.get(name)(4, patch).eval()
    assert network(torch.zeros(1, 1, *patch)).shape == (1, 4, *patch)


def test_the_papers_vnet_has_their_size():
    assert sum(p.numel() for p in NETWORKS.get("vnet")(2, (16,) * 3).parameters()) == pytest.approx(9.44e6, rel=2e-3)
