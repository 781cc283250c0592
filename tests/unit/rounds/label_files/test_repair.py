"""What ``aslseg ledger verify`` names, and what ``--repair`` mends of it."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO, read_studies
from aslseg.errors import LedgerError, RoundRunningError
from aslseg.files import sha256, write_json
from aslseg.rounds.label_files.masks import sync_label_files, verify_label_files
from aslseg.rounds.label_files.repair import repair
from aslseg.rounds.label_files.rollback import roll_back, roll_back_case
from aslseg.rounds.ledger.anchor import Head, read_head, write_head
from aslseg.rounds.ledger.ledger import Entry, Ledger, Score
from aslseg.rounds.ledger.vetoes import mask_vetoes
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.settings import Paths, Settings
from mask_rounds import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two rounds, a label by a person, a veto, a validation patient and scores."""
    folder = Folder(tmp_path)
    folder.human("c")
    label = folder.root / "labels" / FINAL / "c.nii.gz"
    info = {"sha256": sha256(label), "user": "ann"}
    folder.ledger.append([Entry("saved", case="c", tag=FINAL, details={"sha256": info["sha256"], "info": info})])
    labels = {FINAL: {"ext": ".nii.gz", "info": info}}
    write_json(folder.root / "datastore_v2.json", {"objects": {"c": {"labels": labels}}})
    folder.ledger.append([Entry("validation", details={"patient": "c"})])
    folder.round({"a": 1, "b": 1}, {"a": 1, "b": 1})
    roll_back_case(folder.paths, "b")
    folder.ledger.set_scores([Score("a", 2, 0.9, {})])
    folder.round({"a": 2}, {"a": 2, "b": 2})
    assert verify_label_files(folder.paths) == []
    return folder


def state(folder: Folder) -> dict[str, object]:
    """What the next round goes by."""
    ledger = Ledger(folder.paths.ledger)
    return {
        "files": folder.files(),
        "masks": {t: {c: e.details["sha256"] for c, e in _masks(ledger, t)} for t in (PSEUDO, ORIGINAL)},
        "promoted": {(p.case, p.round, p.sha256) for p in ledger.promotions()},
        "rounds": [(r.number, r.state) for r in ledger.rounds()],
        "validation": ledger.validation_patients(),
        "vetoes": mask_vetoes(ledger),
        "saved": {e.case: e.details["sha256"] for e in ledger.events(kinds=("saved",))},
    }


def _masks(ledger: Ledger, tag: str) -> list:
    return [(c, e) for c, e in ledger.masks(tag).items() if e.kind == "mask"]


def delete_ledger(folder: Folder, *more: str) -> None:
    for pattern in ("ledger.sqlite*", *more):
        for path in filter(Path.is_file, folder.paths.home.glob(pattern)):
            path.unlink()


def cut(folder: Folder, events: int) -> None:
    with sqlite3.connect(folder.paths.ledger) as db:
        db.execute("DROP TRIGGER no_delete")
        db.execute("DELETE FROM events WHERE seq > (SELECT max(seq) FROM events) - ?", [events])
    db.close()


@pytest.mark.parametrize(
    "more", [(), ("ledger.head.json",), ("datastore_v2.json",)], ids=["head kept", "head lost", "info lost"]
)
def test_a_deleted_ledger_is_named_and_rebuilt_from_files(folder: Folder, more: tuple[str, ...]) -> None:
    before = state(folder)
    delete_ledger(folder, *more)
    if "datastore_v2.json" in more:
        (folder.root / "datastore_v2.json").unlink()
        before["saved"] = {}
    named = verify_label_files(folder.paths)
    assert any("the file is gone" in n for n in named)
    assert any("a.nii.gz: not recorded as promoted" in n for n in named)
    (line, *rest) = repair(folder.paths)
    assert "Events rebuilt from reports and label files:" in line
    assert rest == []
    assert state(folder) == before
    assert verify_label_files(folder.paths) == []
    assert repair(folder.paths) == []
    (lost,) = folder.ledger.events(kinds=("lost",))
    assert lost.details["reports"] == ["round-1.json", "round-2.json"]
    # and work goes on
    assert folder.round({"a": 0}, {"a": 0}) == 3
    roll_back(folder.paths, 3)
    assert folder.files() == before["files"]
    assert verify_label_files(folder.paths) == []


@pytest.mark.parametrize("events", [1, 2, 4, 6, 9])
def test_a_cut_tail_is_continued_with_what_the_files_say(folder: Folder, events: int) -> None:
    before = state(folder)
    cut(folder, events)
    problem = verify_label_files(folder.paths)[0]
    assert f"{events} of {read_head(folder.ledger.anchor).events} events are missing" in problem
    with pytest.raises(LedgerError, match="--repair"):
        roll_back(folder.paths, 1)
    assert "is on record now" in repair(folder.paths)[0]
    after = state(folder)
    # a round whose report exists is over; if only its last events were lost it goes on
    assert {k: v for k, v in after.items() if k != "rounds"} == {k: v for k, v in before.items() if k != "rounds"}
    assert [n for n, _ in after["rounds"]] == [1, 2]
    assert verify_label_files(folder.paths) == []


def test_a_ledger_from_a_backup_contradicts_its_head_and_the_reports(folder: Folder) -> None:
    count = len(folder.ledger.events())
    cut(folder, 3)
    # somebody who knows of the head
    write_head(folder.ledger.anchor, folder.ledger.head())
    assert folder.ledger.verify() is None
    problem = verify_label_files(folder.paths)[0]
    assert "events are missing at its end, says round-2.json" in problem
    repair(folder.paths)
    assert verify_label_files(folder.paths) == []
    assert len(folder.ledger.events()) > count - 3


def test_a_changed_event_needs_a_backup(folder: Folder) -> None:
    with sqlite3.connect(folder.paths.ledger) as db:
        db.executescript("DROP TRIGGER no_update; UPDATE events SET case_id = 'z' WHERE seq = 4")
    db.close()
    before = folder.files()
    with pytest.raises(LedgerError, match=r"event 4 .* was changed .* backup"):
        repair(folder.paths)
    assert folder.files() == before
    for path in folder.paths.home.glob("ledger.*"):
        path.rename(path.with_name(f"damaged-{path.name}"))
    assert "Events rebuilt" in repair(folder.paths)[0]
    assert verify_label_files(folder.paths) == []


def test_the_head(folder: Folder) -> None:
    head = folder.ledger.head()
    second = folder.ledger.events()[head.events - 2]
    write_head(folder.ledger.anchor, Head(second.seq, second.hash))
    assert verify_label_files(folder.paths) == []  # as a kill leaves it
    assert repair(folder.paths) == ["ledger.head.json was 1 events behind; it was brought up to date"]
    folder.ledger.anchor.unlink()
    assert "ledger.head.json" in verify_label_files(folder.paths)[0]
    assert repair(folder.paths) == ["ledger.head.json was missing or damaged; it was written anew"]
    assert read_head(folder.ledger.anchor) == head
    assert repair(folder.paths) == verify_label_files(folder.paths) == []


def test_changed_agreements_are_deleted(folder: Folder) -> None:
    with sqlite3.connect(folder.paths.ledger) as db:
        db.execute("UPDATE scores SET agreement = 1")
    db.close()
    assert "agreements were changed" in verify_label_files(folder.paths)[0]
    assert "aslseg rank" in repair(folder.paths)[0]
    assert folder.ledger.scores() == []
    assert verify_label_files(folder.paths) == []


def test_label_files_are_restored_and_temporary_ones_deleted(folder: Folder) -> None:
    before, final = folder.files(), (folder.root / "labels" / FINAL / "c.nii.gz").read_bytes()
    (folder.root / "labels" / PSEUDO / "a.nii.gz").write_bytes(b"other")
    (folder.root / "labels" / ORIGINAL / "b.nii.gz").unlink()
    left = [folder.root, folder.root / "labels" / FINAL, folder.paths.home, folder.paths.home / "masks"]
    for place in left:
        (place / ".tmp-x.nii.gz").write_bytes(b"half")
    parked = folder.paths.home / "parked"
    parked.mkdir()
    for name, age in (("young", 0), ("old", 7200)):
        (parked / f".tmp-{name}").write_bytes(b"")
        os.utime(parked / f".tmp-{name}", (os.stat(parked).st_mtime - age,) * 2)
    assert repair(folder.paths) == [
        "5 temporary files of processes that were killed were deleted",
        "labels/aslseg_pseudo/a: as the ledger says again",
        "labels/original/b: as the ledger says again",
    ]
    assert folder.files() == before
    assert [p.name for p in folder.root.rglob(".tmp-*")] == [".tmp-young"]
    assert (folder.root / "labels" / FINAL / "c.nii.gz").read_bytes() == final
    assert verify_label_files(folder.paths) == []


def test_what_cannot_be_repaired_is_said(folder: Folder) -> None:
    (folder.root / "labels" / PSEUDO / "a.nii.gz").write_bytes(b"other")
    (folder.root / "labels" / PSEUDO / "b.nii.gz").write_bytes(b"by hand")
    folder.store.path(folder.ledger.masks(PSEUDO)["a"].details["sha256"]).unlink()
    (line,) = repair(folder.paths)
    assert "labels/aslseg_pseudo/a cannot be written again" in line
    assert "a.nii.gz: not what round 2 wrote" in verify_label_files(folder.paths)[0]
    assert (folder.root / "labels" / PSEUDO / "b.nii.gz").read_bytes() == b"by hand"
    with round_lock(folder.paths.home), pytest.raises(RoundRunningError):
        repair(folder.paths)
    with pytest.raises(LedgerError, match="studies folder"):
        repair(Paths(Settings(home=str(folder.paths.home)), "http://pacs.example/dicom-web"))


def test_a_label_whose_info_is_of_another_file_is_named(folder: Folder) -> None:
    path = folder.root / "labels" / FINAL / "c.nii.gz"
    path.write_bytes(b"copied over")
    assert verify_label_files(folder.paths) == [
        f"{path}: another file than its info in datastore_v2.json says; somebody copied it"
    ]
    for damaged in ("{", "[]", '{"objects": {"c": 1, "d": {"labels": {"final": {}}}}}'):
        (folder.root / "datastore_v2.json").write_text(damaged)
        assert verify_label_files(folder.paths) == []


def test_a_damaged_report_is_passed_over(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    before = state(folder)
    delete_ledger(folder)
    (folder.paths.reports / "round-1.json").write_text("{")
    report = json.loads((folder.paths.reports / "round-2.json").read_text())
    (folder.paths.reports / "round-3.json").write_text(json.dumps({"summary": report["summary"]}))
    repair(folder.paths)
    assert "round-1.json cannot be read" in caplog.text
    assert "round-3.json cannot be read" in caplog.text
    after = state(folder)
    assert {k: v for k, v in after.items() if k != "rounds"} == {k: v for k, v in before.items() if k != "rounds"}
    assert after["rounds"] == [(2, "done")]


def test_masks_of_unknown_origin_are_kept_and_not_learned_from(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.round({"a": 1}, {"a": 1})
    delete_ledger(folder, "*")
    for path in (folder.paths.reports / "round-1.json", folder.paths.home / "original" / "a.json"):
        path.unlink()
    before = folder.files()
    repair(folder.paths)
    assert folder.ledger.promotions() == []
    assert folder.files() == before
    folder.round({}, {})
    assert folder.files() == {k: v for k, v in before.items() if k.startswith(ORIGINAL)}
    roll_back(folder.paths, 1)
    assert folder.files() == before
    assert sync_label_files(folder.ledger, read_studies(folder.root), folder.paths) == []
    assert np.asarray(list(folder.store.folder.glob("*.nii.gz"))).size == 1
