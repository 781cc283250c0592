"""A tiny round needs a tiny engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aslseg.agreement.verdict import Verdict
from aslseg.rounds import promotion
from aslseg.ssl import engine


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
