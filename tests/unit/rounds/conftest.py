"""A tiny round needs a tiny engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aslseg.adaptation import severity
from aslseg.agreement.promotion_rules import Verdict
from aslseg.compute.weights import load_weights, save_weights
from aslseg.rounds.promotion import canaries, promotion
from aslseg.rounds.run import train_stage
from aslseg.rounds.steps import pipeline
from aslseg.ssl import engine, networks, training
from tiny_rounds import (
    Judged,
    Learned,
    Scored,
    Training,
    folds_one_by_one,
    tiny_network,
    tiny_settings,
    tiny_studies,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few batch-norm batches, few masks to fit severities on, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    monkeypatch.setattr(severity, "CALIBRATION_DRAWS", 4)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plausible(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Networks of six steps never look right: every mask counts as plausible, also where the truth is known."""
    monkeypatch.setattr(promotion, "judge", lambda *_: Verdict(True))
    monkeypatch.setattr(canaries, "FLOOR", 0.0)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Let a function of a model's SHA-256 stand for the validation Dice of the SSL model, so that a test decides."""

    def by(score: Callable[[str], float]) -> None:
        dice = pipeline.RoundPipeline.dice

        def known(self: Any, maps: Any, cases: Any = None) -> float | None:
            inputs = json.loads((maps.folder / "inputs.json").read_text())
            return score(inputs["ssl"]) if set(inputs) == {"ssl", "settings"} else dice(self, maps, cases)

        monkeypatch.setattr(pipeline.RoundPipeline, "dice", known)

    return by


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """Let a function of what an SSL model has learned, and of a case, stand for its Dice on that case."""
    known: dict[str, Learned] = {}

    def by(score: Callable[[Learned, str], float]) -> None:
        dice, train = pipeline.RoundPipeline.dice, pipeline.RoundPipeline.train_ssl

        def trained(self: Any, promoted: Any, report: Any, without: Any = (), part: float = 1.0) -> Path:
            path = train(self, promoted, report, without, part)
            human = frozenset(c.id for c in self.cases.train if c.id not in without)
            known[self.cases.hashes(path)] = Learned(human, frozenset(p.case.id for p in promoted))
            return path

        def scored_dice(self: Any, maps: Any, cases: Any = None) -> float | None:
            inputs = json.loads((maps.folder / "inputs.json").read_text())
            if set(inputs) != {"ssl", "settings"}:
                return dice(self, maps, cases)
            found = [score(known[inputs["ssl"]], c.id) for c in (self.cases.validation if cases is None else cases)]
            return sum(found) / len(found) if found else None

        monkeypatch.setattr(pipeline.RoundPipeline, "train_ssl", trained)
        monkeypatch.setattr(pipeline.RoundPipeline, "train_folds", lambda self, *given: folds_one_by_one(self)(*given))
        monkeypatch.setattr(pipeline.RoundPipeline, "dice", scored_dice)

    return by


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SSL model that was trained for a step."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(networks, "unet", tiny_network)
        train_stage("ssl", tiny_studies(root, cases=1, labelled=1), tiny_settings(root, ssl_iterations=1))
    return next((root / "models").rglob("ssl-*.safetensors"))


@pytest.fixture
def trainings(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """Human and promoted cases of each training; these give a file at once, another one for other cases."""
    done: list[Training] = []

    def train(labelled: Any, unlabelled: Any, settings: Any, out: Path, *, spacing: Any, **more: Any) -> dict[str, Any]:
        assert all(c.label is None for c in unlabelled)
        human = {c.id: c for c in labelled if c.voxel_weight is None}
        promoted = {c.id: c for c in labelled if c.voxel_weight is not None}
        done.append((human, promoted))
        state, metadata = load_weights(model_file, "ssl")
        text = json.dumps([sorted((c.id, c.label_hash) for c in human.values()), sorted(promoted), settings.seed])
        name = next(iter(state))
        state[name] = state[name] + int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 1e9
        save_weights(out, state, metadata | {"spacing": spacing and list(spacing)})
        more["report"](1, 1)
        return {}

    monkeypatch.setattr(networks, "unet", tiny_network)
    monkeypatch.setattr(training, "train", train)
    return done
