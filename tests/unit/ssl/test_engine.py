"""The training engine around the methods: steps, schedules, aborts, checkpoints, memory."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aslseg.errors import TrainingDivergedError
from aslseg.ssl import checkpoint, compiling, engine
from aslseg.ssl.monitor import TrainingMonitor
from aslseg.ssl.networks import VNet
from aslseg.types import no_progress


@pytest.fixture
def quick(tiny_settings):
    """Settings of the quickest network; it has no batch norm and no dropout."""
    return lambda **changes: tiny_settings(
        **{"network": "unet", "ssl_method": "supervised", "batch_labelled": 1, "batch_unlabelled": 1, **changes}
    )


def mean_loss(trainer):
    """A method's loss that is a plain mean over patches, unlike Dice, which is one number per batch."""

    def loss(batch, part, generator):
        image = batch.image.to(next(trainer.method.parameters()).dtype)
        value = F.cross_entropy(trainer.method.student(image), batch.target)
        return value, {"foreground": 0.1}

    return loss


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.method.named_parameters() if p.grad is not None}


def test_promoted_masks_decide_nothing_of_the_patch(make_case, quick):
    """The layers of some networks depend on it, and retraining goes on from the model without promoted masks."""
    human, large = make_case(0, shape=(100, 90, 45)), make_case(1, shape=(100, 90, 52))
    promoted = [replace(large, id=f"p{n}", weight=0.5, voxel_weight=np.ones(large.image.shape)) for n in range(3)]
    wanted = quick(patch="auto", patch_voxels=2e5)
    assert engine.Trainer([large], [], wanted, 5).patch != engine.Trainer([human], [], wanted, 5).patch
    assert engine.Trainer([human, *promoted], [], wanted, 5).patch == engine.Trainer([human], [], wanted, 5).patch


# learning rate


def test_polynomial_and_milestones(make_case, quick):
    trainer = engine.Trainer([make_case(0)], [], quick(learning_rate=0.5), 6000)
    assert engine.SCHEDULES[trainer.settings.schedule](0.25) == pytest.approx(0.75**0.9)
    steps = [0, 2499, 2500, 4999, 5000, 5999]
    rates = [engine.SCHEDULES["milestones"](s / 6000) for s in steps]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_a_step_sets_the_learning_rate(make_case, quick):
    trainer = engine.Trainer([make_case(0)], [], quick(schedule="milestones", learning_rate=0.5), 10)
    trainer.method.loss = mean_loss(trainer)
    assert trainer.step(5)["learning_rate"] == pytest.approx(0.05)
    assert [g["lr"] for g in trainer.optimiser.param_groups] == pytest.approx([0.05])


# accumulation


def test_two_accumulated_batches_have_the_gradient_of_one_twice_as_large(make_case, quick):
    cases = [make_case(0), make_case(1)]
    trainer = engine.Trainer(cases, [], quick(accumulate=2), 10)
    trainer.method.double().loss = mean_loss(trainer)
    logs = trainer._gradients(3, 0.3)
    accumulated = gradients(trainer)

    # batches are numbered through the run: step 3 of two batches each takes numbers 6 and 7
    both = [engine.Trainer(cases, [], quick(), 10).batch(n) for n in (6, 7)]
    trainer.optimiser.zero_grad()
    logits = trainer.method.student(torch.cat([b.image for b in both]).double())
    loss = F.cross_entropy(logits, torch.cat([b.target for b in both]))
    loss.backward()
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-9)
    for name, expected in gradients(trainer).items():
        assert torch.allclose(accumulated[name], expected, rtol=1e-6, atol=1e-9), name


# aborts


def test_gradients_that_are_not_finite_are_skipped_and_then_the_end(make_case, quick):
    trainer = engine.Trainer([make_case(0)], [], quick(), 1000)
    weight = next(trainer.method.student.parameters())
    finite = True

    def loss(batch, part, generator):
        # the square root of 0 has no finite derivative
        step_off = weight.sum() - weight.sum().detach()
        value = step_off if finite else step_off.abs().sqrt()
        return value, {"foreground": 0.1}

    trainer.method.loss = loss
    finite = False
    before = weight.detach().clone()
    for step in range(engine.MOST_SKIPPED - 1):
        trainer.step(step)
    assert torch.equal(weight, before)
    finite = True
    trainer.step(19)
    assert not torch.equal(weight, before)
    assert (trainer.skipped, trainer.skipped_in_a_row) == (19, 0)
    finite = False
    for step in range(20, 39):
        trainer.step(step)
    with pytest.raises(TrainingDivergedError, match=r"last 20 steps up to step 39 were not finite.*learning_rate"):
        trainer.step(39)
    state = trainer.state()
    other = engine.Trainer([make_case(0)], [], quick(), 1000)
    other.load_state(state)
    assert (other.skipped, other.skipped_in_a_row) == (39, 20)


def seen(total: int, *runs: tuple[int, float, float]) -> TrainingMonitor:
    """A watch after some steps of (how many, predicted, labelled foreground); the loss counts up from 1."""
    monitor = TrainingMonitor(total, no_progress)
    for steps, predicted, true in runs:
        for _ in range(steps):
            monitor.update({"loss": monitor.done + 1.0, "foreground": predicted, "truth": true})
    return monitor


def test_collapse_below_a_tenth_of_the_labelled_foreground():
    with pytest.raises(TrainingDivergedError, match=r"0\.90% of the labelled patches.*10\.00% labelled.*\(now 0\.1\)"):
        seen(400, (200, 0.009, 0.1)).check_collapse(0.1)
    seen(400, (200, 0.011, 0.1)).check_collapse(0.1)
    seen(402, (200, 0.0, 0.1)).check_collapse(0.1)
    seen(300, (199, 0.0, 0.1)).check_collapse(0.1)
    seen(400, (200, 0.0, 0.0)).check_collapse(0.1)
    with pytest.raises(TrainingDivergedError, match=r"10\.00% labelled; train longer"):
        seen(400, (200, 0.009, 0.1)).check_collapse(0.0)
    # what was before the last 200 steps does not count
    with pytest.raises(TrainingDivergedError, match="collapsed"):
        seen(400, (150, 0.1, 0.1), (200, 0.0, 0.1)).check_collapse(0.1)


def test_a_collapse_is_told_with_the_weight_in_effect(make_case, quick, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(TrainingMonitor, "check_collapse", lambda self, consistency: told.append(consistency))
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 0)
    engine.train([make_case(0)], [], quick(ssl_method="dtc"), tmp_path / "m.safetensors", iterations=1, spacing=None)
    assert told == [1.0]


def test_the_watch_goes_on_after_an_interruption():
    monitor = seen(1000, (150, 0.0, 0.1))
    resumed = TrainingMonitor(1000, no_progress)
    resumed.start_at(monitor.done, monitor.recent)
    resumed.update({"loss": 153.0, "foreground": 0.2, "truth": 0.3})
    assert (resumed.done, len(resumed.recent), resumed.recent[-1]) == (151, 151, [153.0, 0.2, 0.3])
    assert resumed.loss(3) == (149 + 150 + 153) / 3
    assert len(seen(1000, (250, 0.1, 0.1)).recent) == 200
    assert TrainingMonitor(1, no_progress).loss(5) is None


# checkpoints


def test_a_checkpoint_every_so_many_minutes_too(make_case, quick, tmp_path, monkeypatch, caplog):
    written = []
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda path, step, *rest: (written.append(step), write(path, step, *rest)))
    monkeypatch.setattr(engine, "CHECKPOINT_MINUTES", 0.0)
    out = tmp_path / "m.safetensors"
    with caplog.at_level(logging.INFO):
        result = engine.train([make_case(0)], [], quick(), out, iterations=3, spacing=None)
    assert written == [1, 2]
    assert result["seconds_per_step"] > 0
    assert (result["steps"], result["skipped_steps"]) == (3, 0)
    assert "step 2 of 3, loss" in caplog.text
    assert "supervised, unet with" in caplog.text
    monkeypatch.setattr(engine, "CHECKPOINT_MINUTES", 60.0)
    written.clear()
    engine.train([make_case(0)], [], quick(), out, iterations=3, spacing=None)
    assert written == []


def owner_of(cases, settings, state, free=()):
    return checkpoint.fingerprint({"kind": "ssl"}, settings, state, cases, free)


def test_a_checkpoint_belongs_to_its_inputs(make_case, quick, tmp_path):
    case, settings, state = make_case(0), quick(), {"w": torch.zeros(2, 3)}
    owner = owner_of([case], settings, state)
    assert owner_of([make_case(0)], settings, {"w": torch.ones(2, 3)}) == owner
    for changes in (
        *({"training_memory_gb": 0}, {"tracking": "tensorboard"}, {"device": "cpu"}, {"threads": 3}),
        *({"sam_iterations": 5}, {"gate_tolerance": 0.5}, {"click_seconds": 3}, {"overlap": 0}),
        *({"sam_base": "b.pth"}, {"adapter_iterations": 1}),
    ):
        assert owner_of([case], quick(**changes), state) == owner, changes
    for changes in (
        *({"seed": 7}, {"accumulate": 2}, {"schedule": "milestones"}, {"ssl_method": "bcp"}, {"flips": True}),
        *({"window_low": -50}, {"consistency": 0.5}, {"batch_unlabelled": 2}, {"ema_decay": 0.5}),
    ):
        assert owner_of([case], quick(**changes), state) != owner, changes
    relabelled = make_case(0)
    relabelled.label[0, 0, 0] ^= 1
    assert owner_of([relabelled], settings, state) != owner
    assert owner_of([replace(case, weight=0.5)], settings, state) != owner
    assert owner_of([case], settings, {"w": torch.zeros(3, 2)}) != owner
    assert owner_of([], settings, state, [case]) != owner
    np.save(tmp_path / "image-1.npy", case.image)
    mapped = replace(case, image=np.load(tmp_path / "image-1.npy", mmap_mode="r"))
    (tmp_path / "image-1.npy").rename(tmp_path / "image-2.npy")
    renamed = replace(case, image=np.load(tmp_path / "image-2.npy", mmap_mode="r"))
    assert owner_of([mapped], settings, state) != owner_of([renamed], settings, state)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        torch.save([1, 2], path)
    else:
        path.write_bytes(b"\x80\x04garbage" * 100)


@pytest.mark.parametrize("how", ["cut", "empty", "foreign", "garbage"])
def test_a_damaged_checkpoint_is_passed_over(how, tmp_path, caplog):
    path = tmp_path / "m.checkpoint.pt"
    assert checkpoint.read(path, "me", torch.device("cpu")) is None
    checkpoint.write(path, 7, "me", {"recent": [[1.0, 0.5, 0.25]], "w": torch.arange(1000.0)})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = checkpoint.read(path, "me", torch.device("cpu"))
    assert (found["step"], found["recent"]) == (7, [[1.0, 0.5, 0.25]])
    assert torch.equal(found["w"], torch.arange(1000.0))
    assert checkpoint.read(path, "you", torch.device("cpu")) is None
    damage(path, how)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.read(path, "me", torch.device("cpu")) is None
    assert "m.checkpoint.pt is damaged" in caplog.text


# memory


def test_batches_do_not_depend_on_the_memory_budget(make_case, quick, tmp_path):
    cases = []
    for n in range(4):
        case = make_case(n, n < 2)
        np.save(tmp_path / f"{n}.npy", case.image)
        cases.append(replace(case, image=np.load(tmp_path / f"{n}.npy", mmap_mode="r")))
    size = cases[0].image.nbytes + cases[0].label.nbytes
    batches, in_memory = [], []
    for budget in (0, 2.5 * size / 1e9, 4):
        settings = quick(ssl_method="mean_teacher", training_memory_gb=budget)
        trainer = engine.Trainer(cases[:2], cases[2:], settings, 10)
        in_memory.append(
            [
                not isinstance(c.image, np.memmap)
                for c in trainer.batches.labelled.cases + trainer.batches.unlabelled.cases
            ]
        )
        batches.append(trainer.batch(4))
    assert in_memory == [[False] * 4, [True, True, False, False], [True] * 4]
    for other in batches[1:]:
        for part in ("image", "target", "weight", "unlabelled"):
            assert torch.equal(getattr(batches[0], part), getattr(other, part))


# torch.compile


@pytest.mark.parametrize("method", ["supervised", "mcnet"])
def test_networks_are_compiled_whether_called_as_a_whole_or_in_parts(method, make_case, quick, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.extend(node for node in graph.graph.nodes if "conv" in str(node.target))
        return graph.forward

    # as deep with fewer layers, which take long to trace
    monkeypatch.setattr(VNet, "ENCODER", (1,) * 5)
    monkeypatch.setattr(VNet, "DECODER", (1,) * 4)
    cases, settings = [make_case(0)], quick(ssl_method=method, network="vnet_small")
    plain = engine.Trainer(cases, cases, settings, 10)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    trainer = engine.Trainer(cases, cases, settings.model_copy(update={"compile": True}), 10)
    assert trainer.step(0) == plain.step(0)
    layers = [n for n, m in trainer.method.named_modules() if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d)]
    assert len(compiled) == len(layers)
    assert list(trainer.method.state_dict()) == list(plain.method.state_dict())
    compiling.to_eager(trainer.method)
    assert trainer.step(1) == plain.step(1)
    assert len(compiled) == len(layers)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiler_that_fails_is_said_and_training_goes_on(make_case, quick, monkeypatch, caplog):
    import torch._inductor.config as inductor

    plain = engine.Trainer([make_case(0)], [], quick(), 10)
    expected = plain.step(0)
    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nonexistent/compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    trainer = engine.Trainer([make_case(0)], [], quick(compile=True), 10)
    with caplog.at_level(logging.WARNING):
        got = trainer.step(0)
    assert "torch.compile failed" in caplog.text
    assert got == expected
    assert math.isfinite(trainer.step(1)["loss"])
    assert list(trainer.method.state_dict()) == list(plain.method.state_dict())
    torch._dynamo.reset()
