"""Taking back and repairing, killed before any step and repeated, end as if nobody had killed them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from durable_writes import killed_in_fork

from aslseg.cases.studies import ORIGINAL, PSEUDO
from aslseg.errors import LedgerError
from aslseg.models.kinds import ModelKind
from aslseg.models.published import Candidate, manifest, put_manifest, stage_files
from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.label_files.repair import repair
from aslseg.rounds.label_files.rollback import roll_back, roll_back_case, roll_back_model
from aslseg.rounds.ledger import rows as module
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.ledger.vetoes import mask_vetoes, model_vetoes
from mask_rounds import Folder

STEPS = range(1, 10)


def publish(folder: Folder, number: int) -> None:
    made = folder.root.with_name("made")
    made.write_text(f"model {number}")
    before = manifest(folder.paths)
    after = stage_files(folder.paths, [Candidate(ModelKind.SSL, made, 0.5, None, 1)], number)
    folder.ledger.append([Entry("published", number, details={"before": before, "after": after, "why": []})])
    put_manifest(folder.paths, after)


def two_rounds(root: Path) -> Folder:
    folder = Folder(root)
    for number, value in ((1, 1), (2, 2)):
        publish(folder, number)
        folder.round({"a": value, "b": value}, {"a": value, "b": value, "c": value})
    return folder


def lose_ledger(folder: Folder) -> None:
    for path in folder.paths.home.glob("ledger.sqlite*"):
        path.unlink()


def state(folder: Folder) -> dict[str, object]:
    ledger = Ledger(folder.paths.ledger)
    return {
        "files": folder.files(),
        "served": manifest(folder.paths)["ssl"]["round"],
        "rounds": [(r.number, r.state) for r in ledger.rounds()],
        "masks": {
            t: {c: (e.kind, e.details.get("sha256")) for c, e in ledger.masks(t).items()} for t in (PSEUDO, ORIGINAL)
        },
        "promotions": sorted((p.case, p.round, p.status) for p in ledger.promotions(active_only=False)),
        "vetoes": (mask_vetoes(ledger), model_vetoes(ledger)),
    }


WORK: dict[str, Callable[[Folder], object]] = {
    "round": lambda folder: roll_back(folder.paths, 2),
    "case": lambda folder: roll_back_case(folder.paths, "a"),
    "model": lambda folder: roll_back_model(folder.paths, "ssl"),
    "repair": lambda folder: repair(folder.paths),
}


def done(folder: Folder, work: Callable[[Folder], object]) -> None:
    """Repeat what may have been done already."""
    with suppress(LedgerError):
        work(folder)


@pytest.fixture(scope="module", params=list(WORK))
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, object]]:
    """What is done, the folder before it, and the state after it if nobody disturbs it."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    folder = two_rounds(before)
    if request.param == "repair":
        lose_ledger(folder)
    shutil.copytree(before, after, dirs_exist_ok=True)
    whole = Folder(after)
    WORK[request.param](whole)
    return request.param, before, state(whole)


@pytest.mark.parametrize("step", STEPS)
def test_killed_before_a_step_and_repeated(
    tmp_path: Path, undisturbed: tuple[str, Path, dict[str, object]], step: int
) -> None:
    name, before, expected = undisturbed
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    killed = Folder(tmp_path)
    assert killed_in_fork(lambda: WORK[name](killed), step) or step > 2
    assert killed.ledger.verify() is None or name == "repair"
    done(killed, WORK[name])
    assert state(killed) == expected
    assert verify_label_files(killed.paths) == []


@pytest.mark.parametrize("days", [(0, -400, 0, 400), (0, -1, -2, -3), (0, 400, -400, 1)])
def test_a_clock_that_jumps_changes_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: tuple[int, ...]
) -> None:
    jumps = itertools.cycle(days)
    monkeypatch.setattr(module, "utc", lambda: (datetime.now(UTC) + timedelta(days=next(jumps))).isoformat())
    folder = two_rounds(tmp_path)
    assert verify_label_files(folder.paths) == []
    second = folder.files()
    folder.round({"a": 0}, {"a": 0})
    roll_back(folder.paths, 3)
    assert folder.files() == second
    assert manifest(folder.paths)["ssl"]["round"] == 2
    lose_ledger(folder)
    repair(folder.paths)
    assert folder.files() == second
    assert verify_label_files(folder.paths) == []


def test_a_ledger_that_cannot_be_opened_says_what_to_look_at(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.path.mkdir()
    with pytest.raises(LedgerError, match=r"unable to open database file; check the disk and its permissions"):
        ledger.append([Entry("note")])
