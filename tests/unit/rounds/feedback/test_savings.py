"""What machine masks save people: which mask counts as the one that was shown, what is compared, what is counted."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.cases.studies import FINAL, ORIGINAL
from aslseg.files import sha256
from aslseg.review.report import collect as report_of
from aslseg.review.report import write
from aslseg.review.status import collect as status_of
from aslseg.rounds.feedback.savings import COMPARED, in_words, record_compared, savings
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image, write_label
from tiny_rounds import tiny_settings, tiny_studies

A, B, C = "phantom_000", "phantom_001", "phantom_002"


class Desk:
    """A studies folder in which masks are shown and people save labels, without a server."""

    def __init__(self, root: Path) -> None:
        self.settings = tiny_settings(root)
        self.studies = tiny_studies(root, cases=3, labelled=0)
        self.truth = root / "studies_truth"
        self.paths = Paths(self.settings, self.studies)
        self.ledger = Ledger(self.paths.ledger)

    def mask(self, case: str) -> np.ndarray:
        return read_image(self.truth / f"{case}.nii.gz").array.astype(np.uint8)

    def show(self, case: str, mask: np.ndarray, promoted: bool = False) -> None:
        affine = read_image(self.studies / f"{case}.nii.gz").affine
        digest = MaskStore(self.paths.home).add(mask, affine)
        details = {"sha256": digest, "source": "ssl", "promoted": promoted}
        self.ledger.append([Entry("mask", 1, case, ORIGINAL, details)])

    def save(self, case: str, mask: np.ndarray, minutes: float | None = None) -> None:
        path = self.studies / "labels" / FINAL / f"{case}.nii.gz"
        write_label(path, mask, read_image(self.studies / f"{case}.nii.gz").affine)
        now = int(time.time()) + 1
        details: dict[str, Any] = {"sha256": sha256(path), "by": None, "info": {"ts": now}}
        if minutes is not None:
            details["handed_out"] = now - 60 * minutes
        self.ledger.append([Entry("saved", case=case, tag=FINAL, details=details)])

    def savings(self) -> dict[str, Any] | None:
        record_compared(self.paths, self.settings)
        return savings(self.ledger)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def changed(mask: np.ndarray, voxels: int) -> np.ndarray:
    """The mask without so many voxels of the liver."""
    found = mask.copy()
    found[tuple(np.argwhere(mask == 1)[:voxels].T)] = 0
    return found


def test_unchanged_nearly_and_changed_with_dice_and_minutes(desk: Desk) -> None:
    for case in (A, B, C):
        desk.show(case, desk.mask(case))
    desk.save(A, desk.mask(A), minutes=0)
    desk.save(B, changed(desk.mask(B), 1), minutes=0)
    desk.save(C, changed(desk.mask(C), 150), minutes=0)
    found = desk.savings()
    assert found is not None
    assert (found["scans"], found["unchanged"], found["nearly"]) == (3, 1, 1)
    assert 0.7 < found["dice"]["liver"] < 1
    assert (found["timed"], found["too_long"]) == (3, 0)
    text = " ".join(in_words(found))
    assert "labels of 3 scans that had a machine mask. They accepted 1 of these masks (33%) unchanged" in text
    assert "(median of 3 scans)" in text


def test_a_pair_is_compared_once_and_the_last_label_counts(desk: Desk) -> None:
    desk.show(A, desk.mask(A))
    desk.save(A, desk.mask(A))
    desk.savings()
    desk.savings()
    assert len(desk.ledger.events(kinds=(COMPARED,))) == 1
    desk.save(A, changed(desk.mask(A), 150))
    found = desk.savings()
    assert found is not None
    assert (found["scans"], found["unchanged"]) == (1, 0)


def test_the_mask_that_was_there_when_the_scan_was_handed_out(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that draws another mask between Next Sample and saving changes nothing."""
    from aslseg.rounds.ledger import rows as module

    monkeypatch.setattr(module, "utc", lambda: "2026-01-01T10:00:00+00:00")
    desk.show(A, desk.mask(A))
    monkeypatch.setattr(module, "utc", lambda: "2099-01-01T10:00:00+00:00")
    desk.show(A, changed(desk.mask(A), 150))
    desk.save(A, desk.mask(A), minutes=5)
    found = desk.savings()
    assert found is not None
    assert (found["unchanged"], found["minutes"]) == (1, 5)


def test_what_takes_longer_than_two_hours_and_a_clock_that_is_moved_back_are_not_counted(desk: Desk) -> None:
    for case, minutes in ((A, 10), (B, 600), (C, -30)):
        desk.show(case, desk.mask(case))
        desk.save(case, desk.mask(case), minutes)
    found = desk.savings()
    assert found is not None
    assert (found["scans"], found["timed"], found["too_long"]) == (3, 1, 1)
    assert "median of 1 scan; 1 took longer than 120 minutes" in " ".join(in_words(found))


def test_scans_without_a_mask_and_labels_that_are_gone_count_for_nothing(desk: Desk) -> None:
    desk.save(A, desk.mask(A))
    desk.show(B, desk.mask(B))
    desk.save(B, desk.mask(B))
    (desk.studies / "labels" / FINAL / f"{B}.nii.gz").unlink()
    desk.show(C, desk.mask(C))
    desk.save(C, desk.mask(C))
    shutil.copy(desk.truth / f"{A}.nii.gz", desk.studies / "labels" / FINAL / f"{C}.nii.gz")
    assert desk.savings() is None
    assert in_words(None) == ["Nobody has saved a label yet for a scan that had a machine mask."]


def test_a_mask_that_a_rollback_took_away_was_not_shown(desk: Desk) -> None:
    desk.show(A, desk.mask(A))
    shown = desk.ledger.masks(ORIGINAL)[A]
    desk.ledger.append([Entry("removed", None, A, ORIGINAL, {"why": "rollback", "was": shown.details["sha256"]})])
    desk.save(A, desk.mask(A))
    assert desk.savings() is None


def test_a_mask_that_is_no_longer_kept_is_passed_over(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.show(A, desk.mask(A))
    desk.save(A, desk.mask(A))
    for path in (desk.paths.home / "masks").glob("*"):
        path.unlink()
    assert desk.savings() is None
    assert f"shown for {A} was not compared" in caplog.text


def test_it_stands_on_the_page_and_in_the_report(desk: Desk) -> None:
    desk.show(A, desk.mask(A))
    desk.save(A, desk.mask(A), minutes=0)
    desk.ledger.append([Entry("opened", 1)])
    desk.ledger.close_round(1, {})
    desk.savings()
    sentence = "They accepted 1 of these masks (100%) unchanged"
    assert sentence in status_of(desk.settings, desk.paths, {})["savings"][0]
    assert sentence in report_of(desk.paths, desk.settings, desk.ledger.rounds()[0])["savings"][0]
    assert sentence in write(desk.paths, desk.settings)[0].read_text()


def test_without_a_studies_folder_nothing_is_compared(settings_only: Settings, tmp_path: Path) -> None:
    paths = Paths(settings_only, "https://pacs.example/dicom-web")
    record_compared(paths, settings_only)


@pytest.fixture
def settings_only(tmp_path: Path) -> Settings:
    return Settings(model_dir=str(tmp_path / "models"), home=str(tmp_path / "home"))
