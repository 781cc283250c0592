"""A round that is killed at any step after its networks were trained, and resumed, ends as one that was left alone.

The networks were trained before, in another folder: each step is found by its inputs, so that a round takes a second.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from round_killer import run_to_point
from test_killed_rounds import history, verdicts

from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.label_files.repair import repair
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.settings import Paths, Settings
from tiny_rounds import copy_with_steps, label_hashes, published_hashes, tiny_settings, tiny_studies

ACCEPTED = [
    ("append opened *", 1),
    ("replace *ledger.head.json", 1),
    ("replace *ledger.head.json", 2),
    ("append validation *", 1),
    ("append scored", 1),
    ("replace */masks/*.nii.gz", 1),
    ("append mask aslseg_pseudo", 1),
    ("replace *ledger.head.json", 5),
    ("replace */labels/aslseg_pseudo/*", 1),
    ("replace */labels/aslseg_pseudo/*", 2),
    ("replace */models/ssl-*", 1),
    ("replace */models/adapter-*", 1),
    ("append published *", 1),
    ("replace *ledger.head.json", 6),
    ("replace */manifest.json", 1),
    ("append mask original", 1),
    ("replace */labels/original/*", 1),
    ("replace */labels/original/*", 2),
    ("replace */.aslseg/original/*.json", 1),
    ("replace */used.json", 1),
    ("replace */reports/round-1.json", 1),
    ("append closed *", 1),
    ("replace *ledger.head.json", 8),
]
REJECTED = [
    ("append fresh *", 1),
    ("replace *ledger.head.json", 2),
    ("append mask aslseg_pseudo", 1),
    ("replace */labels/aslseg_pseudo/*", 1),
    ("append *withdrawn*", 1),
    ("replace *ledger.head.json", 5),
    ("replace */labels/aslseg_pseudo/*", 3),
    ("append mask original", 1),
    ("replace */reports/round-2.json", 1),
    ("append closed *", 1),
]


@dataclass
class Round:
    """A folder before a round, the steps of that round, and how the round ends if it is left alone."""

    before: Path
    after: Path
    seed: int
    good: str | None

    def copy(self, root: Path) -> tuple[Path, Settings]:
        """The folder before the round, with the steps that the round will find."""
        copy_with_steps(self.before, self.after, root)
        return root / "studies", settings_in(root, self.seed)


def settings_in(root: Path, seed: int) -> Settings:
    return tiny_settings(root, promote_fraction=1, seed=seed)


def new_patient(studies: Path) -> None:
    """A person adds a scan, and labels it."""
    other = tiny_studies(studies.parent / "other", cases=1, labelled=1, seed=9)
    for folder in (Path(), Path("labels") / "final"):
        shutil.copy(other / folder / "phantom_000.nii.gz", studies / folder / "new.nii.gz")
    shutil.rmtree(other.parent)


def in_child(
    studies: Path, settings: Settings, point: str | None, occurrence: int, good: str | None, number: int | None = None
) -> int | None:
    """Exit code of a round in a child, forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["round_killer"])
    child = context.Process(target=run_to_point, args=(studies, settings, point, occurrence, good, number))
    child.start()
    child.join(300)
    return child.exitcode


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Round]]:
    """Two rounds that were left alone: the first is published, the second is rejected."""
    with pytest.MonkeyPatch.context() as patched:
        # the server that children are forked from does not know pytest's sys.path
        patched.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        start, first, labelled, second = map(tmp_path_factory.mktemp, ("start", "first", "labelled", "second"))
        settings_in(start, 1)
        tiny_studies(start, cases=4, labelled=2)
        shutil.copytree(start, first, dirs_exist_ok=True)
        assert in_child(first / "studies", settings_in(first, 1), None, 1, None) == 0
        good = published_hashes(settings_in(first, 1), first / "studies")["ssl"]
        shutil.copytree(first, labelled, dirs_exist_ok=True)
        new_patient(labelled / "studies")
        shutil.copytree(labelled, second, dirs_exist_ok=True)
        assert in_child(second / "studies", settings_in(second, 2), None, 1, good) == 0
        yield {"accepted": Round(start, first, 1, None), "rejected": Round(labelled, second, 2, good)}


def shown(root: Path, settings: Settings) -> dict[str, object]:
    """All that a round leaves behind, without times."""
    studies = root / "studies"
    return {
        "labels": label_hashes(studies),
        "models": published_hashes(settings, studies),
        "verdicts": verdicts(settings, studies),
        "history": history(settings, studies),
        "reports": sorted(p.name for p in (studies / ".aslseg" / "reports").iterdir()),
    }


def test_the_rounds_are_what_they_are_called(rounds: dict[str, Round]) -> None:
    first, second = (shown(r.after, settings_in(r.after, r.seed)) for r in rounds.values())
    assert [status for *_, status in first["verdicts"]["promotions"]] == ["active", "active"]
    assert set(first["models"]) == {"ssl", "sam", "adapter"}
    assert [status for *_, status in second["verdicts"]["promotions"]] == ["active", "withdrawn"] * 2
    assert second["models"]["ssl"] == first["models"]["ssl"]
    assert len(second["history"]) > len(first["history"])
    assert [(kind, case) for _, kind, _, case, *_ in second["history"] if kind == "fresh"] == [("fresh", "new")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "point", "occurrence"),
    [("accepted", *p) for p in ACCEPTED] + [("rejected", *p) for p in REJECTED],
)
def test_killed_just_before(rounds: dict[str, Round], tmp_path: Path, which: str, point: str, occurrence: int) -> None:
    chosen = rounds[which]
    studies, settings = chosen.copy(tmp_path)
    assert in_child(studies, settings, point, occurrence, chosen.good) == -signal.SIGKILL
    paths = Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    assert ledger.verify() is None
    ledger.require_whole()
    number = len(list(chosen.after.glob("studies/.aslseg/reports/round-*.json")))
    if (number, "done") not in [(r.number, r.state) for r in ledger.rounds()]:
        assert in_child(studies, settings, None, 1, chosen.good) == 0
    assert verify_label_files(paths) == []
    repair(paths)
    assert not [p for p in tmp_path.rglob(".tmp-*") if "cache" not in p.parts]
    assert shown(tmp_path, settings) == shown(chosen.after, settings_in(chosen.after, chosen.seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("replace */masks/*.nii.gz", errno.ENOSPC),
        ("replace */labels/aslseg_pseudo/*", errno.EROFS),
        ("replace */models/sam-*", errno.ENOSPC),
        ("replace */manifest.json", errno.EIO),
        ("replace */labels/original/*", errno.EIO),
        ("replace */reports/round-1.json", errno.ENOSPC),
    ],
)
def test_the_disk_refuses(rounds: dict[str, Round], tmp_path: Path, point: str, number: int) -> None:
    chosen = rounds["accepted"]
    studies, settings = chosen.copy(tmp_path)
    assert in_child(studies, settings, point, 1, chosen.good, number) == 1
    paths = Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    assert ledger.verify() is None
    (row,) = ledger.rounds()
    assert row.state == "open"
    assert ("disk full" if number == errno.ENOSPC else os.strerror(number)) in str(row.error)
    assert not [p for p in tmp_path.rglob(".tmp-*") if "cache" not in p.parts]
    assert in_child(studies, settings, None, 1, chosen.good) == 0
    assert verify_label_files(paths) == []
    expected, found = shown(chosen.after, settings_in(chosen.after, chosen.seed)), shown(tmp_path, settings)
    kinds = [kind for _, kind, *_ in found["history"]]
    assert kinds.count("failed") == 1
    assert [k for k in kinds if k != "failed"] == [kind for _, kind, *_ in expected["history"]]
    assert found | {"history": None} == expected | {"history": None}


@pytest.mark.slow
def test_a_disk_that_refuses_the_head_refuses_no_event(rounds: dict[str, Round], tmp_path: Path) -> None:
    chosen = rounds["accepted"]
    studies, settings = chosen.copy(tmp_path)
    assert in_child(studies, settings, "replace *ledger.head.json", 5, chosen.good, errno.ENOSPC) == 0
    assert shown(tmp_path, settings) == shown(chosen.after, settings_in(chosen.after, chosen.seed))
    assert verify_label_files(Paths(settings, studies)) == []
