"""A tiny round needs a tiny engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aslseg.agreement.promotion_rules import Verdict
from aslseg.rounds import pipeline, promotion
from aslseg.ssl import engine
from tiny_rounds import Judged, Learned, Scored


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few batch-norm batches and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(engine, "STATISTICS_BATCHES", 2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plausible(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Networks of six steps never look right: every mask counts as plausible."""
    monkeypatch.setattr(promotion, "judge", lambda *_: Verdict(True))


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

        def trained(self: Any, promoted: Any, report: Any, without: Any = ()) -> Path:
            path = train(self, promoted, report, without)
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
        monkeypatch.setattr(pipeline.RoundPipeline, "dice", scored_dice)

    return by
