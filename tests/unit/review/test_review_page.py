"""The status page: everything in it, nothing executed, nothing fetched."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aslseg.files import write_json
from aslseg.review.ledger_lists import MOST
from aslseg.review.page import duration, render
from aslseg.review.status import collect
from aslseg.rounds.ledger.ledger import Entry, Ledger, Score
from aslseg.rounds.scheduling.nights import Nights
from aslseg.settings import Paths, load_settings
from own_thread import for_this_thread

STORE = {"total": 3, "completed": 1, "label_tags": {"final": 1}}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    settings, _ = load_settings({"model_dir": str(tmp_path / "model")}, env={})
    return Paths(settings, tmp_path / "studies")


def status(paths: Paths, errors: list | None = None) -> dict:
    return collect(load_settings({}, env={})[0], paths, STORE, errors or [])


def test_empty_start(paths: Paths) -> None:
    found = status(paths)
    assert found["progress"] == {"state": "none", "finish_text": ""}
    assert [m["published"] for m in found["models"]] == [False, False, False]
    page = render(found)
    assert "No round has run yet" in page
    assert "3 scans, 1 with a human label" in page
    assert not paths.home.exists(), "looking leaves no traces"


@pytest.mark.parametrize("state", ["running", "done", "failed", "interrupted", "paused"])
def test_progress(paths: Paths, state: str) -> None:
    import os

    content = {
        "state": state,
        "pid": os.getpid(),
        "round": 4,
        "stage": "train sam",
        "stage_index": 2,
        "stages": 9,
    }
    content |= {"eta": 720, "part": 0.25, "numbers": {"loss": 0.3}, "error": "disk full", "seconds": {}}
    content |= {"finish": "2026-11-27T02:40:00+00:00", "message": "the time for this round ended"}
    write_json(paths.home / "progress.json", content)
    page = render(status(paths))
    expected = {
        "running": "12 min",
        "done": "Round 4 is done",
        "failed": "disk full",
        "interrupted": "goes on where",
        "paused": "Round 4 waits: the time",
    }
    assert expected[state] in page
    assert ("about 12 min to go, done about " in page) == (state == "running")


def test_what_is_promised_and_whether_audits_kept_it(paths: Paths) -> None:
    assert "no promise yet: it needs audits of promoted masks" in render(status(paths))
    ledger = Ledger(paths.ledger)
    about = {"target": 0.85, "confidence": 0.9, "bound": None, "k": 0, "audits": 1, "pairs": 9, "r": None}
    promise = {"liver": about | {"made": False, "missing": 2}}
    drawn = {"sha256": "m", "image": "i", "agreement": {"liver": 0.9}, "promoted": True}
    ledger.append([Entry("opened", 1), Entry("audit", 1, "c1", "aslseg_pseudo", drawn)])
    ledger.close_round(1, {"promise": promise})
    page = render(status(paths))
    assert "<li>liver: no promise yet: 2 more audits</li>" in page
    assert "1 promoted mask waits for an audit" in page
    made = {"liver": about | {"made": True, "missing": 0, "bound": 0.86, "k": 9, "audits": 6}}
    ledger.append([Entry("opened", 2), Entry("audit", 2, "c2", "aslseg_pseudo", drawn)])
    ledger.close_round(2, {"promise": made})
    line = "liver: promised: mean Dice of the promoted at least 0.85 (0.9 confidence), from 6 audits"
    assert f"<li>{line}</li>" in render(status(paths))
    answered = {"mask": "m", "label": "l", "dice": {"liver": 0.6}}
    ledger.append([Entry("checked", 2, "c2", "aslseg_pseudo", answered)])
    page = render(status(paths))
    assert f'<li class="bad">{line}; 1 audit since: mean Dice 0.600, NOT kept</li>' in page


def test_names_are_escaped_and_nothing_is_fetched(paths: Paths) -> None:
    evil = "<script>alert(1)</script>"
    ledger = Ledger(paths.ledger)
    ledger.set_scores([Score(evil, 1, 0.5, {})])
    ledger.append([Entry("opened", 1), Entry("failed", 1, details={"error": evil})])
    details = {"sha256": "0", "agreement": {evil: 0.9, "tumour": None}, "threshold": {}, "models": {}}
    ledger.append([Entry("mask", 1, evil, "aslseg_pseudo", details)])
    page = render(status(paths, [{"model": evil, "time": None, "lines": [evil]}]))
    assert evil not in page
    assert page.count("&lt;script&gt;") == 6
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page


def test_out_of_fold_dice_of_a_round(paths: Paths) -> None:
    ledger = Ledger(paths.ledger)
    number, _ = ledger.open_round({})
    ledger.close_round(number, {"out_of_fold": {"dice": {"liver": 0.91234, "tumour": None}}})
    ledger.open_round({})
    page = render(status(paths))
    assert page.count("liver 0.912, tumour empty") == 1
    assert "not measured" not in page, "the second round may still do it"
    ledger.close_round(2, {})
    page = render(status(paths))
    assert page.count("not measured") == 1
    assert "Out-of-fold Dice needs two labelled patients to train on" in page


def test_damaged_ledger_is_told_not_thrown(paths: Paths) -> None:
    paths.home.mkdir(parents=True)
    paths.ledger.write_bytes(b"no database at all" * 100)
    assert "restore the file" in render(status(paths))


@pytest.mark.parametrize(("seconds", "text"), [(None, "unknown"), (45, "45 s"), (720, "12 min"), (12000, "3 h 20 min")])
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_times_are_short():
    from aslseg.review.page import moment, number

    assert [number(v) for v in (0.8073975512614617, 3, "ssl")] == ["0.8074", "3", "ssl"]
    assert moment("2026-11-21T12:00:52.996286+00:00") == "2026-11-21 12:00 UTC"
    assert moment(None) == ""


def test_what_is_passed_over_stands_on_the_page(paths: Paths) -> None:
    assert paths.studies is not None
    paths.studies.mkdir(parents=True, exist_ok=True)
    (paths.studies / "a.nii.gz").write_bytes(b"scan")
    (paths.studies / "gone<b>.nii.gz").symlink_to("/not/mounted.nii.gz")
    page = render(status(paths))
    assert "gone&lt;b&gt;.nii.gz: a link to /not/mounted.nii.gz, which is not there" in page
    (paths.studies / "patients.csv").write_text("id,person\n")
    assert "patients.csv: line 1: columns" in render(status(paths))


def test_labels_without_a_scan_and_notes_on_headers_stand_on_the_page(paths: Paths) -> None:
    assert paths.studies is not None
    (paths.studies / "labels" / "final").mkdir(parents=True)
    (paths.studies / "anna.nii.gz").write_bytes(b"scan")
    (paths.studies / "labels" / "final" / "ana.nii.gz").write_bytes(b"label")
    settings, note = load_settings({}, env={})[0], "anna.nii.gz: its header is in micrometres; converted to millimetres"
    page = render(collect(settings, paths, STORE, notes=[note]))
    assert "labels/final/ana.nii.gz: no scan &#39;ana&#39; in the folder; did you mean &#39;anna&#39;?" in page
    assert note in page


def test_a_saved_label_does_not_list_the_scans_again(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    root = paths.studies
    assert root is not None
    (root / "labels" / "final").mkdir(parents=True)
    for name in ("a.nii.gz", "b.nii.gz", "b.nrrd"):
        (root / name).write_bytes(b"only its name counts here")
    for folder in (root, root / "labels" / "final"):
        os.utime(folder, (1e9, 1e9))
    first = status(paths)["problems"]
    assert [p for p in first if p.startswith("b.nrrd: b.nii.gz has the same id")]
    listed: list[Path] = []
    scandir = os.scandir
    noting = for_this_thread(lambda folder: listed.append(Path(folder)) or scandir(folder), scandir)
    monkeypatch.setattr(os, "scandir", noting)
    (root / "labels" / "final" / "c.nii.gz").write_bytes(b"")
    os.utime(root / "labels" / "final", (1.1e9, 1.1e9))
    second = status(paths)["problems"]
    assert second[: len(first)] == first
    assert "no scan 'c'" in second[-1]
    assert root not in listed
    (root / "c.nii.gz").write_bytes(b"")
    os.utime(root, (1.1e9, 1.1e9))
    assert status(paths)["problems"] == first


def test_a_summary_is_read_once_and_a_saved_label_reads_no_decision_again(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thirty rounds on ten thousand scans these are 40 MB of JSON, which took two seconds on every page."""
    ledger = Ledger(paths.ledger)
    mask = {"sha256": "m", "agreement": {"liver": 0.9}, "threshold": {}, "models": {}}
    for number in (1, 2):
        ledger.append([Entry("opened", number), Entry("mask", number, "c1", "aslseg_pseudo", mask)])
        decided = {"agreement": 0.5, "per_label": {}, "promoted": False, "reasons": ["x"]}
        ledger.close_round(number, {"decisions": {"c1": decided}, "out_of_fold": {"dice": {"liver": number / 10}}})
    first = status(paths)
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr("aslseg.rounds.ledger.rows.json.loads", lambda text: parsed.append(text) or loads(text))
    assert status(paths) == first
    assert not [text for text in parsed if "decisions" in text or "agreement" in text]
    ledger.append([Entry("saved", case="c3", tag="final", details={"sha256": "0", "info": {"agreement": 1}})])
    assert status(paths) == first
    ledger.append([Entry("opened", 3)])
    assert len(status(paths)["rounds"]) == 3
    ledger.close_round(3, {"out_of_fold": {"dice": {"liver": 0.3}}})
    parsed.clear()
    found = status(paths)
    assert not [text for text in parsed if "decisions" in text]
    assert [r["out_of_fold"] for r in found["rounds"]] == [{"liver": 0.3}, {"liver": 0.2}, {"liver": 0.1}]
    assert found["not_promoted"]["round"] == 3


def test_another_ledger_in_the_place_of_one_is_read_anew(paths: Paths) -> None:
    ledger = Ledger(paths.ledger)
    ledger.append([Entry("opened", 1), Entry("failed", 1, details={"error": "of the first ledger"})])
    assert "of the first ledger" in render(status(paths))
    for file in paths.home.glob("ledger*"):
        file.unlink()
    ledger.append([Entry("opened", 1), Entry("failed", 1, details={"error": "of the second ledger"})])
    page = render(status(paths))
    assert "of the second ledger" in page
    assert "of the first ledger" not in page


def test_the_newest_promotions_stand_on_the_page_with_their_states(paths: Paths) -> None:
    ledger = Ledger(paths.ledger)
    mask = {"sha256": "m", "agreement": {"liver": 0.9}, "threshold": {}, "models": {}}
    ledger.append([Entry("mask", 1, f"c{n:02d}", "aslseg_pseudo", mask) for n in range(MOST + 10)])
    ledger.append([Entry("removed", 2, "c59", "aslseg_pseudo"), Entry("mask", 2, "c20", "aslseg_pseudo", mask)])
    shown = [(p["case"], p["round"], p["status"]) for p in status(paths)["promotions"]]
    assert len(shown) == MOST
    assert shown[:3] == [("c20", 2, "active"), ("c59", 1, "demoted"), ("c58", 1, "active")]
    assert ("c20", 1, "demoted") in shown


def test_what_the_last_round_left_out_stands_on_the_page(paths: Paths) -> None:
    ledger = Ledger(paths.ledger)
    number, _ = ledger.open_round({})
    assert "left out" not in render(status(paths)), "nothing is known before it ends"
    skipped = {"b": "b.nii.gz: 3 voxels are NaN", "c": "a scan of 9 x 9 x 9 voxels"}
    ledger.close_round(number, {"skipped": skipped, "warnings": ["no validation cases"]})
    page = render(status(paths))
    assert "scans that it left out" in page
    for text in ("no validation cases", "<li>b.nii.gz: 3 voxels are NaN", "c: a scan of 9 x 9 x 9 voxels"):
        assert text in page


def test_models_of_a_folder_that_an_earlier_version_used_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved before its home knew where its models are: the page says which folder to rename."""
    monkeypatch.setenv("ASLSEG_APP_DIR", str(tmp_path / "app"))
    settings = load_settings({}, env={})[0]
    served = {"ssl": {"sha256": "1" * 64, "file": "ssl-1.safetensors", "bytes": 1}}
    write_json(tmp_path / "app" / "model" / "old-0123abcd" / "manifest.json", {"models": served})
    (tmp_path / "new").mkdir()
    paths = Paths(settings, tmp_path / "new")
    Ledger(paths.ledger).append([Entry("published", 1, details={"before": {}, "after": served})])
    (problem, *_) = collect(settings, paths, STORE)["problems"]
    assert "old-0123abcd holds those that its ledger published last" in problem
    assert problem.endswith(f"rename that folder to {paths.models.name}")
    (tmp_path / "app" / "model" / "old-0123abcd").rename(paths.models)
    assert "holds those" not in str(collect(settings, paths, STORE)["problems"])


def test_the_schedule_and_why_scans_were_not_promoted(paths: Paths) -> None:
    settings, _ = load_settings({"night": "22:00-06:00", "time_zone": "UTC", "after_labels": "5"}, env={})
    ledger = Ledger(paths.ledger)
    nights = Nights(ledger, settings)
    nights.note_end("2026-11-26T22:00:00+00:00", "round 1 is done", datetime(2026, 11, 27, 3, tzinfo=UTC))
    nights.note_stop("ann", datetime(2026, 11, 27, 9, tzinfo=UTC))
    ledger.open_round({})
    refused = {"agreement": 0.7, "per_label": {"liver": 0.9, "tumour": 0.5}, "promoted": False}
    refused["reasons"] = ["tumour: agreement 0.500 below 0.7", "liver: 40 pieces, more than 30"]
    strange = {"agreement": 0.9, "per_label": {}, "promoted": True, "reasons": [], "flags": ["liver: worth a look"]}
    ledger.close_round(1, {"decisions": {"c<1>": refused, "c2": strange}, "promoted": ["c2"]})
    nights.note_stop("ann", datetime(2026, 11, 27, 9, tzinfo=UTC))
    mask = {"sha256": "m", "agreement": {"liver": 0.9}, "threshold": {}, "models": {}}
    ledger.append([Entry("mask", 1, "c2", "aslseg_pseudo", mask)])
    ledger.append([Entry("checked", 1, "c2", "aslseg_pseudo", {"dice": {"liver": 0.75, "tumour": None}, "mask": "m"})])
    page = render(collect(settings, paths, STORE))
    assert "A round starts after 5 new labels." in page
    assert "Stopped by ann on Fri 27 Nov 09:00" in page
    assert "By the schedule on Thu 26 Nov 22:00: round 1 is done." in page
    assert "Not promoted in round 1" in page
    assert "<li>1 scan: tumour: agreement below 0.7</li>" in page
    row = '<td class="n">liver 0.900, tumour 0.500</td><td>tumour: agreement 0.500 below 0.7; liver: 40 pieces'
    assert f"c&lt;1&gt;</td>{row}" in page
    assert "<td>c2</td><td>promoted</td><td>liver: worth a look</td>" in page
    assert '<a href="/aslseg/reports/1">' in page
    assert "liver 0.750, tumour empty" in page
