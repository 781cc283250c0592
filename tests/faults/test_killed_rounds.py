"""A round that is killed again and again ends as one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from round_killer import run

from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.scheduling.progress import read_progress
from aslseg.settings import Paths, Settings
from tiny_rounds import label_hashes, published_hashes, tiny_settings, tiny_studies

MOST_RUNS = 120
# Of a round's summary, what a kill may change: a round that is resumed after it has published says "unchanged".
MAY_DIFFER = ("seconds", "measured", "rates", "inputs", "continued", "published", "ledger")


def in_child(studies: Path, settings: Settings, die_at: int | None = None, before: bool = False) -> int:
    """Exit code of a round in a child; a fork of a server that has imported everything, so that this takes no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["round_killer"])
    child = context.Process(target=run, args=(studies, settings, die_at, before))
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def verdicts(settings: Settings, studies: Path) -> dict[str, object]:
    """What was decided, without times."""
    ledger = Ledger(Paths(settings, studies).ledger)
    return {
        "scores": [(s.case, s.agreement, s.details) for s in ledger.scores()],
        "promotions": sorted((p.case, p.round, p.sha256, p.status) for p in ledger.promotions(active_only=False)),
        "rounds": [(r.number, r.state) for r in ledger.rounds()],
        "masks": [
            sorted((c, e.details["sha256"]) for c, e in ledger.masks(t).items()) for t in ("original", "aslseg_pseudo")
        ],
    }


def history(settings: Settings, studies: Path) -> list[tuple[object, ...]]:
    """Every event of the ledger in its order, without times, hashes of the chain and the folder that it lies in."""
    events = Ledger(Paths(settings, studies).ledger).events()
    kept = [{k: v for k, v in e.details.items() if k not in MAY_DIFFER} for e in events]
    texts = [json.dumps(d, sort_keys=True).replace(str(studies.parent), "") for d in kept]
    texts = [re.sub(r'"date": "[^"]*"', "", t) for t in texts]
    return [(e.seq, e.kind, e.round, e.case, e.tag, text) for e, text in zip(events, texts, strict=True)]


@pytest.mark.slow
def test_a_round_killed_at_every_few_writes_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the server that children are forked from does not know pytest's sys.path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    results = []
    for name in ("whole", "killed"):
        root = tmp_path / name
        root.mkdir()
        studies, settings = tiny_studies(root, cases=5), tiny_settings(root, promote_fraction=0.5)
        kills = 0
        if name == "killed":
            # each run comes seven writes further; every other one dies just before the seventh
            while (code := in_child(studies, settings, 7, before=kills % 2 == 1)) == -signal.SIGKILL:
                kills += 1
                assert read_progress(Paths(settings, studies).home / "progress.json")["state"] in (
                    "interrupted",
                    "none",
                )
                assert Ledger(Paths(settings, studies).ledger).verify() is None
                assert kills < MOST_RUNS
                rounds = Ledger(Paths(settings, studies).ledger).rounds()
                if rounds and rounds[-1].state == "done":
                    code = 0  # the last kill came after the round was closed; one more run would be the next round
                    break
            assert kills > 8
        else:
            code = in_child(studies, settings)
        assert code == 0
        paths = Paths(settings, studies)
        assert verify_label_files(paths) == []
        assert list((studies / "labels").rglob(".tmp-*")) == [] or name == "killed"
        assert list(paths.rounds.rglob(".tmp-*")) == []
        shown = label_hashes(studies), published_hashes(settings, studies), verdicts(settings, studies)
        results.append((*shown, history(settings, studies)))
    for whole, killed in zip(*results, strict=True):
        assert killed == whole
    assert len(results[0][0]) == 3 + 2 + 1
