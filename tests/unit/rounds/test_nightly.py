"""Rounds night after night: they settle, end in time, go on, and are judged by nobody that they learned from."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aslseg.compute.overlap import dice
from aslseg.errors import DiskFullError, OutOfTimeError, TrainingDivergedError
from aslseg.models.published import find_published
from aslseg.review import report
from aslseg.rounds import nightly
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.nightly import run_night
from aslseg.rounds.promotion import promotion
from aslseg.rounds.recipes import aslseg as recipe
from aslseg.rounds.run import run_round, train_stage
from aslseg.rounds.scheduling import brake as brakes
from aslseg.rounds.scheduling.brake import RoundBrake, answering, clicked
from aslseg.rounds.scheduling.progress import read_progress
from aslseg.rounds.steps import pipeline
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image
from tiny_rounds import label_hashes, published_hashes, tiny_settings, tiny_studies

STORED = {"ssl", "predict", "sam", "redraw", "adapter", "refine", "retrain"}


def outcomes(settings: Settings, studies: Path) -> list[str]:
    return [e.details["outcome"] for e in Ledger(Paths(settings, studies).ledger).events(kinds=("night",))]


@pytest.mark.usefixtures("plausible")
def test_nights_without_a_change_settle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # networks of six steps agree by chance, and are better or worse by chance
    monkeypatch.setattr(recipe, "KEEP_GAIN", 1.1)
    monkeypatch.setattr(pipeline.RoundPipeline, "dice", lambda *_: 0.5)
    studies, settings = tiny_studies(tmp_path, cases=5, labelled=3), tiny_settings(tmp_path, promote_fraction=1)
    first = run_night(studies, settings, night="1")
    second = run_night(studies, settings, night="2")
    third = run_night(studies, settings, night="3")
    assert set(first["measured"]) >= STORED
    assert first["promoted"] == second["promoted"] == third["promoted"] == ["phantom_003", "phantom_004"]
    # the masks of the first night are kept, so that the third finds everything that the second has made
    assert not STORED & set(third["measured"])
    assert published_hashes(settings, studies)["ssl"]
    masks = Ledger(Paths(settings, studies).ledger).masks("aslseg_pseudo")
    assert {e.details["sha256"] for e in masks.values()} == {
        e.details["sha256"]
        for e in Ledger(Paths(settings, studies).ledger).events(kinds=("mask",), tag="aslseg_pseudo", number=1)
    }
    kept = tmp_path / "kept.nii.gz"
    shutil.copy(studies / "labels" / "aslseg_pseudo" / "phantom_003.nii.gz", kept)
    fourth = run_night(studies, settings, night="4")
    assert set(fourth) == {"ended"}
    assert fourth["ended"].startswith("settled: rounds 2 to 3 gave no better model")
    assert outcomes(settings, studies) == [*(f"round {n} is done" for n in (1, 2, 3)), fourth["ended"]]
    # a label that comes in starts rounds again, which first note how good the promoted mask was
    shutil.copy(tmp_path / "studies_truth" / "phantom_003.nii.gz", studies / "labels" / "final")
    fifth = run_night(studies, settings, night="5")
    assert fifth["promoted"] == ["phantom_004"]
    assert "ssl" in fifth["measured"]
    ledger = Ledger(Paths(settings, studies).ledger)
    checked = ledger.events(kinds=("checked",))
    assert [e.case for e in checked] == ["phantom_003"]
    truth, mask = (read_image(p).array for p in (studies / "labels" / "final" / "phantom_003.nii.gz", kept))
    assert checked[0].details["dice"]["liver"] == pytest.approx(dice(mask > 0, truth > 0))


@pytest.mark.usefixtures("plausible")
def test_a_mask_is_replaced_when_the_networks_agree_clearly_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings = tiny_studies(tmp_path, cases=5, labelled=4), tiny_settings(tmp_path, promote_fraction=1)
    roles = "".join(f"phantom_00{n},p{n},{'validation' if n else 'train'}\n" for n in range(4))
    (studies / "patients.csv").write_text(f"case,patient,role\n{roles}")
    seen: list[str] = []

    def better_each_time(_: Any, maps: Any, *__: Any) -> float:
        """Else promotions are withdrawn with a model that is no better."""
        seen.extend({maps.folder.name} - set(seen))
        return 0.5 + 0.02 * seen.index(maps.folder.name)

    monkeypatch.setattr(pipeline.RoundPipeline, "dice", better_each_time)
    compare, gained = promotion.compare, [0.0]

    def compared(*arguments: Any) -> Any:
        found = compare(*arguments)
        per_label = dict.fromkeys(found.per_label, 0.5 + gained[0])
        return type(found)(per_label, 0.5 + gained[0])

    monkeypatch.setattr(promotion, "compare", compared)
    recorded = []
    for gain in (0.0, 0.06):
        gained[0] = gain
        run_round(studies, settings)
        recorded.append(Ledger(Paths(settings, studies).ledger).masks("aslseg_pseudo")["phantom_004"].details)
    assert [d["agreement"]["tumour"] for d in recorded] == [0.5, 0.56]
    assert recorded[0]["sha256"] != recorded[1]["sha256"]


class Ends:
    """A brake that ends the work after some steps or scans that stay, where a stage keeps what is half done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, stage: str, begins: bool = False) -> float:
        self.steps -= stage in STORED and not begins
        if self.steps <= 0 and (begins or stage not in brakes.WHOLE_STAGES):
            raise OutOfTimeError(f"{stage} {begins}")
        return 0.0


@pytest.mark.usefixtures("plausible")
def test_a_round_that_runs_out_of_time_again_and_again_ends_as_one_that_does_not(tmp_path: Path) -> None:
    results, ends = [], []
    for name in ("whole", "ended"):
        (tmp_path / name).mkdir()
        studies = tiny_studies(tmp_path / name, cases=5, labelled=3)
        settings = tiny_settings(tmp_path / name, promote_fraction=1)
        paths = Paths(settings, studies)
        while name == "ended" and len(ends) < 60:
            summary = run_night(studies, settings, night=str(len(ends)), brake=Ends(3))
            if "ended" not in summary:
                break
            ends.append(summary["ended"])
            assert read_progress(paths.home / "progress.json")["state"] == "paused"
            assert [r.state for r in Ledger(paths.ledger).rounds()] == ["open"]
        else:
            run_round(studies, settings)
        results.append((label_hashes(studies), published_hashes(settings, studies)))
    assert {"ssl False", "retrain False"} <= set(ends), "a training ends between two steps, and goes on there"
    assert not {"sam False", "adapter False"} & set(ends), "these are done to their end"
    assert results[0] == results[1]
    assert not Ledger(paths.ledger).events(kinds=("failed",)), "the end of the night is no failure"


def test_the_brake_waits_for_clicks_and_ends_at_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(tmp_path / "nowhere"):
        assert not clicked(tmp_path / "nowhere")
    assert RoundBrake(tmp_path)("ssl") == 0
    with answering(tmp_path):
        assert clicked(tmp_path)
    assert clicked(tmp_path)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            monkeypatch.setattr(brakes, "CLICK_SECONDS", 0.0)  # the last click is long ago

    assert RoundBrake(tmp_path, sleep=sleep)("ssl") >= 0
    assert len(waits) == 3
    # the clock was moved back since the last click
    monkeypatch.setattr(brakes, "CLICK_SECONDS", 5.0)
    future = (tmp_path / "clicked").stat().st_mtime + 3600
    import os

    os.utime(tmp_path / "clicked", (future, future))
    assert not clicked(tmp_path)
    now = [datetime(2026, 11, 27, 5, 59, tzinfo=UTC)]
    brake = RoundBrake(tmp_path, datetime(2026, 11, 27, 6, tzinfo=UTC), clock=lambda: now[0])
    assert brake("ssl") == 0
    now[0] = datetime(2026, 11, 27, 6, tzinfo=UTC)
    assert brake("sam") == 0, "nothing of it would be kept"
    with pytest.raises(OutOfTimeError, match="before the stage sam"):
        brake("sam", begins=True)
    with pytest.raises(OutOfTimeError, match="in the stage ssl"):
        brake("ssl")


def test_a_night_with_nothing_to_learn_from_is_quiet_and_one_that_fails_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings = tiny_studies(tmp_path, cases=2, labelled=0), tiny_settings(tmp_path)
    assert "draw at least one label" in run_night(studies, settings, night="1")["ended"]

    def diverges(*_: Any, **__: Any) -> dict[str, Any]:
        raise TrainingDivergedError("loss became nan at Smith_John")

    sent: list[tuple[str, Any]] = []
    monkeypatch.setattr(report, "send", lambda *given: sent.append(given))
    monkeypatch.setattr(nightly, "run_round", diverges)
    watched = settings.model_copy(update={"report_webhook": "http://chat/hook"})
    with pytest.raises(TrainingDivergedError):
        run_night(studies, watched, night="2")
    assert outcomes(settings, studies)[1] == "failed: loss became nan at Smith_John"
    ((address, content),) = sent
    assert (address, content["state"], content["error"]) == ("http://chat/hook", "failed", "TrainingDivergedError")
    assert "Smith" not in str(content), "names of scans may be names of patients"

    def is_out_of_memory(*_: Any, **__: Any) -> dict[str, Any]:
        raise RuntimeError("CUDA out of memory")

    # else the server would start the round again every few seconds until the window closes
    monkeypatch.setattr(nightly, "run_round", is_out_of_memory)
    monkeypatch.setattr(report, "send", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        run_night(studies, watched, night="3")
    assert outcomes(settings, studies)[2] == "failed: RuntimeError: CUDA out of memory"


def test_a_night_that_failed_on_a_full_disk_is_sent_although_it_cannot_be_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, report_webhook="http://chat/hook")
    sent: list[Any] = []

    def full(*_: Any, **__: Any) -> dict[str, Any]:
        raise DiskFullError("disk full")

    monkeypatch.setattr(report, "send", lambda _, content: sent.append(content["error"]))
    monkeypatch.setattr(nightly, "run_round", full)
    monkeypatch.setattr(nightly.Nights, "note_end", full)
    with pytest.raises(DiskFullError):
        run_night(tiny_studies(tmp_path, cases=2, labelled=1), settings, night="1")
    assert sent == ["DiskFullError"]


@pytest.mark.usefixtures("quick")
def test_the_second_label_judges_and_the_first_never_does(tmp_path: Path) -> None:
    """In half of all folders the first label became the judge of the model that had learned from it."""
    studies = tiny_studies(tmp_path, cases=3, labelled=3)
    final = studies / "labels" / "final"
    for first, second in (("phantom_000", "phantom_001"), ("phantom_001", "phantom_000")):
        settings = tiny_settings(tmp_path, home=str(tmp_path / first), model_dir=str(tmp_path / f"{first}-models"))
        kept = {p.name: p.read_bytes() for p in final.iterdir()}
        for path in final.iterdir():
            if path.name != f"{first}.nii.gz":
                path.unlink()
        train_stage("ssl", studies, settings)
        (final / f"{second}.nii.gz").write_bytes(kept[f"{second}.nii.gz"])
        summary = train_stage("ssl", studies, settings)
        ledger = Ledger(Paths(settings, studies).ledger)
        assert ledger.validation_patients() == {second}
        model = find_published(Paths(settings, studies), "ssl")  # type: ignore[arg-type]
        assert model is not None
        assert second not in model.trained_on
        assert model.labelled == (first,)
        assert summary["validation"]["published ssl"] is not None
        for name, content in kept.items():
            (final / name).write_bytes(content)


@pytest.mark.usefixtures("quick")
def test_without_a_fair_judge_more_human_labels_are_published_with_a_warning(tmp_path: Path) -> None:
    """A folder of an earlier version, whose only judge is a case that the published model was trained on."""
    studies = tiny_studies(tmp_path, cases=3, labelled=3)
    settings = tiny_settings(tmp_path)
    table = "case,patient,role\nphantom_000,a,train\nphantom_001,b,{}\nphantom_002,c,train\n"
    aside = tmp_path / "aside.nii.gz"
    (studies / "labels" / "final" / "phantom_002.nii.gz").rename(aside)
    (studies / "patients.csv").write_text(table.format("train"))
    train_stage("ssl", studies, settings)
    first = published_hashes(settings, studies)
    (studies / "patients.csv").write_text(table.format("validation"))
    other = tiny_settings(tmp_path, seed=5)
    unchanged = train_stage("ssl", studies, other)
    assert published_hashes(settings, studies) == first
    assert all("only when there are more human labels" in line for line in unchanged["published"])
    aside.rename(studies / "labels" / "final" / "phantom_002.nii.gz")
    more = train_stage("ssl", studies, settings)
    assert all(
        "published unchecked" in line and "1 new human label and no fewer." in line for line in more["published"]
    )
    assert set(more["published"]) <= set(more["warnings"])
    assert published_hashes(settings, studies) != first
