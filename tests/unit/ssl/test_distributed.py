"""Several processes on the loopback: the same weights in all, and those of one process with the same batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import two_processes

from aslseg.cases.prepared_case import arrays
from aslseg.compute.weights import load_weights
from aslseg.errors import BadSettingsError
from aslseg.ssl import distributed, engine
from tiny_rounds import tiny_settings, tiny_studies


def torchrun(*arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("ASLSEG_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)


def test_two_processes_train_what_one_does(tmp_path, monkeypatch, ports):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    two_processes.train(tmp_path, "one")

    # what one process began, two go on with
    def interrupt(done: int, total: int, **_: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "CHECKPOINT_EVERY", 1)
        with pytest.raises(KeyboardInterrupt):
            engine.train(
                *two_processes.cases(tmp_path),
                two_processes.settings(),
                tmp_path / "resumed.safetensors",
                iterations=two_processes.STEPS,
                spacing=None,
                report=interrupt,
            )
    torch.set_num_threads(before)

    # forks of a process that has imported everything, for which torchrun would take three
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["two_processes"])
    port = ports()
    processes = [context.Process(target=two_processes.take_part, args=(tmp_path, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    assert [p.exitcode for p in processes] == [0, 0]
    names = ("one", "fresh", "fresh-helper", "resumed", "resumed-helper")
    one, *others = (load_weights(tmp_path / f"{n}.safetensors", "ssl")[0] for n in names)
    for name, other in zip(names[1:], others, strict=True):
        for key, expected in one.items():
            assert torch.allclose(other[key], expected, rtol=1e-3, atol=1e-5), f"{name}: {key}"
    for leading, helping in (others[:2], others[2:]):
        assert all(torch.equal(leading[k], helping[k]) for k in leading)
    left = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".npy")
    assert left == sorted(f"{n}.safetensors" for n in names)


def test_batches_that_cannot_be_shared_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = two_processes.settings()
    with pytest.raises(BadSettingsError, match=r"accumulate is 2, but 3 processes.*--conf accumulate 3"):
        distributed.init(settings)


def test_a_worker_gets_the_case_that_the_leading_process_has(tmp_path):
    """The second stage of nested labels draws other batches, by what the cases say of their intensities."""
    for case in (c for stream in two_processes.cases(tmp_path) for c in stream):
        for sent in (case, replace(case, relative=True)):
            got = distributed.unpacked(json.loads(json.dumps(distributed._packed(sent, tmp_path / sent.id))))
            assert got.grid.spacing == sent.grid.spacing
            assert arrays(got).keys() == arrays(sent).keys()
            assert all((array == arrays(sent)[name]).all() for name, array in arrays(got).items())
            for name in ("id", "patient", "weight", "relative"):
                assert getattr(got, name) == getattr(sent, name)


def test_one_process_needs_no_group():
    tensors = [torch.ones(2), torch.zeros(3)]
    distributed.all_reduce_sum(tensors)
    distributed.all_reduce_mean(tensors)
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert torch.equal(tensors[0], torch.ones(2))
    assert distributed.mean_numbers({"b": 2.0, "a": 1.0}) == {"b": 2.0, "a": 1.0}


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path: Path):
    studies, settings = tiny_studies(tmp_path), tiny_settings(tmp_path)
    conf = settings.model_dump(exclude_defaults=True) | {"accumulate": 2, "ssl_iterations": 2, "device": "cpu"}
    pairs = [text for key, value in conf.items() for text in ("--conf", f"{key}={value}")]
    done = torchrun("-m", "aslseg.cli", "train", "ssl", "--studies", studies, "--json", *pairs)
    assert done.returncode == 0, done.stderr[-3000:]
    # one summary, of process 0
    assert set(json.loads(done.stdout)) == {"published", "validation", "warnings", "skipped", "seconds"}
    (model,) = (tmp_path / "models").glob("**/*.safetensors")
    assert load_weights(model, "ssl")[1]["iterations"] == 2
