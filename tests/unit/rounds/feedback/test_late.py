"""What people do between two steps of a round ends a promotion: in training, summary, ledger and label files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aslseg.agreement.promotion_rules import Verdict
from aslseg.cases.studies import ORIGINAL, PSEUDO
from aslseg.rounds.feedback import late
from aslseg.rounds.label_files.masks import HUMAN_WINS, verify_label_files
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.promotion import canaries, promotion
from aslseg.rounds.run import run_round
from aslseg.settings import Paths
from aslseg.ssl import engine
from tiny_rounds import Judged, copy_with_steps, label_hashes, tiny_settings, tiny_studies

CASE, OTHER = "phantom_003", "phantom_004"


def label(studies: Path) -> None:
    shutil.copy(studies.with_name("studies_truth") / f"{CASE}.nii.gz", studies / "labels" / "final")


def replace_scan(studies: Path) -> None:
    shutil.copy(studies / "phantom_000.nii.gz", studies / f"{CASE}.nii.gz")


def delete_scan(studies: Path) -> None:
    (studies / f"{CASE}.nii.gz").unlink()


HAPPENINGS = {label: HUMAN_WINS, replace_scan: late.REPLACED, delete_scan: late.DELETED}


def after_planning(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """The changes are planned, and neither in the ledger nor on the disk."""
    plan = promotion.plan_label_changes

    def planned(*args: object) -> list[Entry]:
        entries = plan(*args)
        if any(e.tag == PSEUDO and e.case == CASE and e.kind == "mask" for e in entries):
            act()
        return entries

    monkeypatch.setattr(promotion, "plan_label_changes", planned)


def before_retraining(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """The mask is promoted, and its file is there."""
    promote = promotion.promote

    def promoted(*args: object) -> list[promotion.Promoted]:
        found = promote(*args)
        assert [p.case.id for p in found] == [CASE, OTHER]
        act()
        return found

    monkeypatch.setattr(promotion, "promote", promoted)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A studies folder before and after a round, whose steps the rounds of the tests find again."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    tiny_settings(before)
    tiny_studies(before, cases=5)
    shutil.copytree(before, after, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "STATISTICS_BATCHES", 2)
        patched.setattr(promotion, "judge", lambda *_: Verdict(True))
        patched.setattr(canaries, "FLOOR", 0.0)
        run_round(after / "studies", tiny_settings(after, promote_fraction=1))
    return before, after


@pytest.mark.parametrize("moment", [after_planning, before_retraining])
@pytest.mark.parametrize("happens", HAPPENINGS)
@pytest.mark.usefixtures("plausible")
def test_the_case_is_neither_learned_from_nor_promoted(
    tmp_path: Path,
    trained: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    judged: Judged,
    happens: Callable[[Path], None],
    moment: Callable[..., None],
) -> None:
    judged(lambda _: 0.5)
    copy_with_steps(*trained, tmp_path)
    studies, settings = tmp_path / "studies", tiny_settings(tmp_path, promote_fraction=1)
    moment(monkeypatch, lambda: happens(studies))
    summary = run_round(studies, settings)
    why = HAPPENINGS[happens]
    assert summary["promoted"] == [OTHER]
    assert summary["dropped"] == {CASE: why}
    inputs = json.loads(Path(summary["models"]["retrained"]).with_name("inputs.json").read_text())
    assert [case for case, *_ in inputs["promoted"]] == [OTHER]
    assert not any(CASE in name for name in label_hashes(studies) if PSEUDO in name or (ORIGINAL in name and why))
    paths = Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    assert {p.case for p in ledger.promotions()} == {OTHER}
    last = ledger.masks(PSEUDO)[CASE]
    assert (last.kind, last.round, last.details["why"]) == ("removed", 1, why)
    assert [e.details["why"] for e in ledger.events(kinds=("note",), tag=ORIGINAL)] == [why]
    assert verify_label_files(paths) == []


@pytest.mark.usefixtures("plausible")
def test_a_label_that_comes_while_the_network_learns_ends_the_promotion_after_it(
    tmp_path: Path, trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, judged: Judged
) -> None:
    judged(lambda _: 0.5)
    copy_with_steps(*trained, tmp_path)
    studies, settings = tmp_path / "studies", tiny_settings(tmp_path, promote_fraction=1)
    publish = promotion.publish_better

    def published(*args: object) -> object:
        label(studies)
        return publish(*args)

    monkeypatch.setattr(promotion, "publish_better", published)
    summary = run_round(studies, settings)
    assert (summary["promoted"], summary["dropped"]) == ([OTHER], {CASE: HUMAN_WINS})
    assert f"{PSEUDO}/{CASE}.nii.gz" not in label_hashes(studies)
    assert {p.case for p in Ledger(Paths(settings, studies).ledger).promotions()} == {OTHER}
