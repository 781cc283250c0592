"""Training curves: what is in the event files and in MLflow's database, also after an interruption."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from aslseg.errors import BadSettingsError
from aslseg.ssl import engine, tracking

STEPS, RATE = 6, 0.5


@pytest.fixture
def interrupted(make_case, tiny_settings, tmp_path, monkeypatch):
    """Trains six steps with an interruption after the fifth, checkpoints and curves every second step."""
    monkeypatch.setattr(tracking, "EVERY", 2)
    monkeypatch.setattr(engine, "CHECKPOINT_EVERY", 2)
    # what _mlflow sets must not outlive the test
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "GIT_PYTHON_REFRESH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(chosen: str) -> Path:
        settings = tiny_settings(
            network="unet", ssl_method="supervised", batch_labelled=1, learning_rate=RATE, tracking=chosen
        )

        def stop(done: int, total: int, **_: float) -> None:
            if done == 5:
                raise KeyboardInterrupt

        inputs = [make_case(0)], [], settings, tmp_path / "m.safetensors"
        more = {"iterations": STEPS, "spacing": None, "logs": tmp_path / "tracking"}
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with pytest.raises(KeyboardInterrupt):
                engine.train(*inputs, **more, report=stop)
            assert engine.train(*inputs, **more)["steps"] == 2
        finally:
            torch.set_num_threads(before)
        return tmp_path / "tracking"

    return run


def expected_rates() -> dict[int, float]:
    """By steps done; the rate is that of the step before."""
    return {done: RATE * (1 - (done - 1) / STEPS) ** 0.9 for done in (2, 4, 6)}


def test_nothing_by_default(interrupted):
    assert not interrupted("none").exists()


def test_tensorboard(interrupted):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = interrupted("tensorboard")
    (run,) = (folder / "tensorboard").iterdir()
    assert run.name.startswith("m-")
    board = events.EventAccumulator(str(run)).Reload()
    assert {"train/loss", "train/foreground", "train/truth", "train/learning_rate"} <= set(board.Tags()["scalars"])
    rates = {e.step: e.value for e in board.Scalars("train/learning_rate")}
    assert rates == pytest.approx(expected_rates())
    assert all(0 < e.value < 10 for e in board.Scalars("train/loss"))
    assert not (folder / "mlflow.sqlite").exists()


def test_mlflow_goes_on_in_the_same_run(interrupted):
    pytest.importorskip("mlflow", reason="mlflow is not installed (pip install 'aslseg[tracking]')")
    folder = interrupted("mlflow")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.sqlite'}")
    experiment = client.get_experiment_by_name("aslseg")
    assert experiment.artifact_location.startswith(folder.as_uri())
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert (run.data.params["ssl_method"], run.data.params["learning_rate"]) == ("supervised", str(RATE))
    history = client.get_metric_history(run.info.run_id, "train learning_rate")
    assert {m.step: m.value for m in history} == pytest.approx(expected_rates())
    assert len(client.get_metric_history(run.info.run_id, "train loss")) == 3
    assert not (folder / "tensorboard").exists()


@pytest.mark.parametrize(("chosen", "missing"), [("mlflow", "mlflow"), ("tensorboard+mlflow", "tensorboard")])
def test_a_missing_package_is_named_before_anything_is_trained(chosen, missing, monkeypatch, make_case, tiny_settings):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(BadSettingsError, match=rf"{missing} is not installed; pip install 'aslseg\[tracking\]'"):
        engine.Trainer([make_case(0)], [], tiny_settings(tracking=chosen), 10)
