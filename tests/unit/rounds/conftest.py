"""A tiny round needs a tiny engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from aslseg.agreement.promotion_rules import Verdict
from aslseg.rounds import canaries, pipeline, promotion
from aslseg.ssl import engine
from tiny_rounds import Judged


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
