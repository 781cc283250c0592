"""Whole rounds on the smallest phantoms: reuse, promotion, publishing, rollback, people who interfere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from aslseg.agreement.promotion_rules import Verdict
from aslseg.cases.split import hash_fraction
from aslseg.compute.weights import read_metadata
from aslseg.errors import BadWeightsError, LedgerError, NoModelError, NotEnoughCasesError, RoundRunningError
from aslseg.rounds import run
from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.label_files.rollback import roll_back
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion import promotion
from aslseg.rounds.ranking import rank_studies
from aslseg.rounds.run import run_round, train_stage
from aslseg.rounds.scheduling.lock import round_lock
from aslseg.rounds.scheduling.progress import read_progress
from aslseg.rounds.steps import pipeline
from aslseg.settings import Paths
from aslseg.ssl import training
from aslseg.volume.io import read_image, write_label
from tiny_rounds import Judged, label_hashes, published_hashes, tiny_settings, tiny_studies


@pytest.mark.usefixtures("plausible")
def test_two_rounds_rank_and_rollback(tmp_path: Path, judged: Judged) -> None:
    judged(lambda _: 0.5)
    studies = tiny_studies(tmp_path)
    settings = tiny_settings(tmp_path, promote_fraction=0.5)
    paths = Paths(settings, studies)
    ledger = Ledger(paths.ledger)
    human = {k: v for k, v in label_hashes(studies).items() if k.startswith("final/")}
    stray = studies / "labels" / "original" / "phantom_003.nii.gz"
    stray.parent.mkdir()
    stray.write_bytes(b"somebody's own mask")
    told: list[dict[str, Any]] = []
    with pytest.raises(NoModelError, match="aslseg round"):
        rank_studies(studies, settings)

    first = run_round(studies, settings, lambda done, total, **shown: told.append({"part": done / total, **shown}))
    assert first["round"] == 1
    assert not first["continued"]
    assert len(first["promoted"]) == 2  # at most half of three, rounded up
    assert set(first["agreement"]) == {"phantom_003", "phantom_004", "phantom_005"}
    (left,) = set(first["agreement"]) - set(first["promoted"])
    assert first["decisions"][left]["reasons"] == ["passed, but 2 scans agree better (promote_fraction 0.5)"]
    assert all("published, the first one" in line for line in first["published"])
    # six steps teach no network what a tumour is
    assert [w for w in first["warnings"] if w.startswith("tumour is not learned")]
    assert "; tumour is not learned" in first["published"][0]
    assert set(first["classes"]) == {"liver", "tumour"}
    page = (paths.home / "reports" / "round-1.html").read_text()
    assert page.count("data:image/png") == 2
    assert "passed, but 2 scans agree better" in page
    after_first = label_hashes(studies)
    assert {k: v for k, v in after_first.items() if k.startswith("final/")} == human
    assert sorted(k for k in after_first if k.startswith("original/")) == [
        f"original/phantom_00{n}.nii.gz" for n in (3, 4, 5)
    ]
    assert [k for k in after_first if "pseudo" in k] == [f"aslseg_pseudo/{c}.nii.gz" for c in first["promoted"]]
    assert [t["part"] for t in told] == sorted(t["part"] for t in told)
    assert read_progress(paths.home / "progress.json")["state"] == "done"
    scan = nib.load(studies / "phantom_005.nii.gz")
    mask = nib.load(studies / "labels" / "original" / "phantom_005.nii.gz")
    np.testing.assert_allclose(mask.affine, scan.affine)
    assert mask.shape == scan.shape
    sidecar = json.loads((paths.home / "original" / "phantom_005.json").read_text())
    assert sidecar["params"]["label_names"] == {"liver": 1, "tumour": 2}
    assert sidecar["round"] == 1
    promotions = ledger.promotions()
    assert {p.case for p in promotions} == set(first["promoted"])
    assert promotions[0].threshold == settings.thresholds
    assert promotions[0].sha256 == after_first[f"aslseg_pseudo/{promotions[0].case}.nii.gz"]
    assert set(promotions[0].models) == {"ssl", "sam", "adapter"}
    models_first = published_hashes(settings, studies)

    second = run_round(studies, settings)
    # the ssl step of round 2 has the inputs of round 1's retraining; sam's have not changed
    assert second["models"]["ssl"] == first["models"]["retrained"]
    assert second["models"]["sam"] == first["models"]["sam"]
    assert second["models"]["adapter"] == first["models"]["adapter"]
    assert "sam" not in second["measured"]
    assert ledger.verify() is None
    assert verify_label_files(paths) == []

    scores = rank_studies(studies, settings)
    assert list(scores.values()) == sorted(scores.values())
    assert [s.case for s in ledger.scores()] == list(scores)

    with pytest.raises(LedgerError, match="there is no round 7"):
        roll_back(paths, 7)
    roll_back(paths, 2)
    assert label_hashes(studies) == after_first
    assert published_hashes(settings, studies) == models_first
    roll_back(paths, 1)
    assert label_hashes(studies) == human | {
        "original/phantom_003.nii.gz": label_hashes(studies)["original/phantom_003.nii.gz"]
    }
    assert stray.read_bytes() == b"somebody's own mask"
    assert published_hashes(settings, studies) == {}
    assert not (paths.home / "original" / "phantom_005.json").exists()
    assert "rolled back before" in roll_back(paths, 1)[0]
    assert [r.state for r in ledger.rounds()] == ["rolled back", "rolled back"]
    assert {p.status for p in ledger.promotions(active_only=False)} == {"rolled back"}
    assert verify_label_files(paths) == []


@pytest.mark.usefixtures("plausible")
def test_a_human_label_saved_during_the_round_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: Judged
) -> None:
    judged(lambda _: 0.5)
    studies, settings = tiny_studies(tmp_path), tiny_settings(tmp_path, promote_fraction=1)
    final = studies / "labels" / "final"

    def judged_while_someone_saves(*_: object) -> Verdict:
        shutil.copy(tmp_path / "studies_truth" / "phantom_004.nii.gz", final)
        return Verdict(True)

    monkeypatch.setattr(promotion, "judge", judged_while_someone_saves)
    summary = run_round(studies, settings)
    assert summary["promoted"] == ["phantom_003", "phantom_005"]
    assert "original/phantom_004.nii.gz" not in label_hashes(studies)
    ledger = Ledger(Paths(settings, studies).ledger)
    assert [e.case for e in ledger.events(kinds=("note",))] == ["phantom_004", "phantom_004"]
    # a promoted case that a human labels later leaves the promoted ones at the next round
    shutil.copy(tmp_path / "studies_truth" / "phantom_003.nii.gz", final)
    run_round(studies, settings)
    assert not (studies / "labels" / "aslseg_pseudo" / "phantom_003.nii.gz").exists()
    assert {p.case for p in ledger.promotions()} == {"phantom_005"}


@pytest.mark.usefixtures("plausible")
def test_a_round_of_two_stages_is_found_again(tmp_path: Path) -> None:
    studies, settings = tiny_studies(tmp_path, cases=5), tiny_settings(tmp_path, nested_fraction=0.5, nested_margin=2)
    summary = run_round(studies, settings)
    stages = read_metadata(Path(summary["models"]["ssl"]))["stages"]
    assert set(stages["second"]) == {"liver"}
    assert "stages" in read_metadata(Path(summary["models"]["retrained"]))
    assert [w for w in summary["warnings"] if w.startswith("tumour is not learned")]
    again = run_round(studies, settings)
    assert not {"ssl", "predict"} & set(again["measured"])


@pytest.mark.usefixtures("plausible")
def test_validation_is_never_learned_from_nor_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies, settings = tiny_studies(tmp_path, cases=6, labelled=3), tiny_settings(tmp_path, promote_fraction=1)
    judge = min(("phantom_000", "phantom_001", "phantom_002"), key=hash_fraction)
    shutil.copy(studies / f"{judge}.nii.gz", studies / "copy.nii.gz")
    (studies / "patients.csv").write_text(f"case,patient,role\n{judge},P,validation\nphantom_005,P,\n")
    seen: list[set[str]] = []
    train = training.train

    def watched(labelled: Any, unlabelled: Any, *rest: Any, **more: Any) -> Any:
        seen.append({c.id for c in (*labelled, *unlabelled)})
        return train(labelled, unlabelled, *rest, **more)

    monkeypatch.setattr(training, "train", watched)
    summary = run_round(studies, settings)
    learned = set().union(*seen)
    assert not learned & {judge, "copy", "phantom_005"}
    assert set(summary["promoted"]) == {"phantom_003", "phantom_004"}
    assert f"validation case {judge}" in summary["skipped"]["copy"]
    # the other scan of the validation patient still gets a mask that clients can show
    assert (studies / "labels" / "original" / "phantom_005.nii.gz").exists()
    ledger = Ledger(Paths(settings, studies).ledger)
    assert ledger.validation_patients() == {"P"}
    # patients.csv may call the patient otherwise later, by a name that chance would not choose
    renamed = max((f"P{n}" for n in range(50)), key=hash_fraction)
    (studies / "patients.csv").write_text(f"case,patient\n{judge},{renamed}\nphantom_005,{renamed}\n")
    seen.clear()
    run_round(studies, settings)
    assert not set().union(*seen) & {judge, "copy", "phantom_005"}
    assert ledger.validation_patients() == {"P"}
    assert ledger.validation_patients({judge: renamed}) == {"P", renamed}


@pytest.mark.usefixtures("quick")
def test_one_label_no_unlabelled_missing_class_and_bad_files(tmp_path: Path) -> None:
    studies, settings = tiny_studies(tmp_path, cases=5, labelled=5), tiny_settings(tmp_path)
    for n in (1, 2, 3):
        (studies / f"phantom_00{n}.nii.gz").rename(tmp_path / f"scan{n}.nii.gz")
        (studies / "labels" / "final" / f"phantom_00{n}.nii.gz").rename(tmp_path / f"label{n}.nii.gz")
    for n in (0, 4):
        label = read_image(studies / "labels" / "final" / f"phantom_00{n}.nii.gz")
        write_label(studies / "labels" / "final" / f"phantom_00{n}.nii.gz", label.array > 0, label.affine)
    # a label of another shape, so that one labelled case is left
    write_label(studies / "labels" / "final" / "phantom_004.nii.gz", np.ones((3, 3, 3), np.uint8), np.eye(4))
    (studies / "patients.csv").write_text("case,patient,role\nphantom_000,a,train\nphantom_004,b,train\n")
    summary = run_round(studies, settings)
    assert "phantom_004" in summary["skipped"]
    assert "shape" in summary["skipped"]["phantom_004"]
    warnings = " ".join(summary["warnings"])
    assert "no validation cases" in warnings
    assert "no unlabelled scans" in warnings
    assert "'tumour'" in warnings
    assert summary["agreement"] == {}
    assert set(published_hashes(settings, studies)) == {"ssl", "sam", "adapter"}
    # nothing to compare with: what is published stays
    before = published_hashes(settings, studies)
    again = run_round(studies, tiny_settings(tmp_path, seed=3))
    assert published_hashes(settings, studies) == before
    assert "without validation cases" in again["published"][0]

    (tmp_path / "scan1.nii.gz").rename(studies / "phantom_001.nii.gz")
    whole = (tmp_path / "scan2.nii.gz").read_bytes()
    (studies / "phantom_002.nii.gz").write_bytes(whole[: len(whole) // 2])
    volume = read_image(tmp_path / "scan3.nii.gz")
    array = volume.array.copy()
    array[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(array, volume.affine), studies / "phantom_003.nii.gz")
    third = run_round(studies, settings)
    assert "truncated" in third["skipped"]["phantom_002"]
    assert "NaN" in third["skipped"]["phantom_003"]
    assert set(third["agreement"]) == {"phantom_001"}


def test_no_labelled_case_and_no_readable_label(tmp_path: Path) -> None:
    studies, settings = tiny_studies(tmp_path, cases=2, labelled=0), tiny_settings(tmp_path)
    with pytest.raises(NotEnoughCasesError, match="draw at least one label"):
        run_round(studies, settings)
    final = studies / "labels" / "final"
    final.mkdir(parents=True, exist_ok=True)
    (final / "phantom_000.nii.gz").write_bytes(b"no image")
    with pytest.raises(NotEnoughCasesError, match=r"phantom_000\.nii\.gz"):
        run_round(studies, settings)
    paths = Paths(settings, studies)
    assert read_progress(paths.home / "progress.json")["state"] == "failed"
    row = Ledger(paths.ledger).rounds()[0]
    assert row.state == "open"
    assert "phantom_000" in str(row.error)
    with pytest.raises(NotEnoughCasesError, match="no such folder"):
        run_round(tmp_path / "nowhere", settings)


def test_a_second_round_and_a_rollback_wait_for_the_first(tmp_path: Path) -> None:
    studies, settings = tiny_studies(tmp_path, cases=2, labelled=1), tiny_settings(tmp_path)
    paths = Paths(settings, studies)
    Ledger(paths.ledger).open_round({})
    with round_lock(paths.home):
        with pytest.raises(RoundRunningError, match="already running"):
            run_round(studies, settings)
        with pytest.raises(RoundRunningError, match="already running"):
            roll_back(paths, 1)


@pytest.mark.usefixtures("quick")
def test_a_worse_model_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = tiny_studies(tmp_path, cases=3, labelled=3)
    settings = tiny_settings(tmp_path)
    summary = train_stage("ssl", studies, settings)
    assert set(published_hashes(settings, studies)) == {"ssl"}
    assert "published, the first one" in summary["published"][0]
    first = published_hashes(settings, studies)["ssl"]
    dice = pipeline.RoundPipeline.dice

    def harsh(self: Any, maps: Any, cases: Any = None) -> float | None:
        weights = json.loads((maps.folder / "inputs.json").read_text())["ssl"]
        return dice(self, maps, cases) if weights == first else -0.5

    monkeypatch.setattr(pipeline.RoundPipeline, "dice", harsh)
    other = tiny_settings(tmp_path, seed=99)
    assert "not published" in train_stage("ssl", studies, other)["published"][0]
    assert published_hashes(settings, studies) == {"ssl": first}
    lenient = tiny_settings(tmp_path, seed=99, gate_tolerance=1.0)
    train_stage("ssl", studies, lenient)
    assert published_hashes(settings, studies)["ssl"] != first


@pytest.mark.usefixtures("quick")
def test_the_working_spacing_is_kept_once_a_model_is_published(tmp_path: Path) -> None:
    studies = tiny_studies(tmp_path, cases=3, labelled=2)
    settings = tiny_settings(tmp_path, max_working_voxels=2000)
    train_stage("ssl", studies, settings)
    paths = Paths(settings, studies)
    kept = read_metadata(next(paths.models.glob("ssl-*")))["spacing"]
    train_stage("ssl", studies, tiny_settings(tmp_path, max_working_voxels=4000, seed=4))
    assert {tuple(read_metadata(p)["spacing"]) for p in paths.models.glob("ssl-*")} == {tuple(kept)}
    # a spacing that is asked for is taken, and the published model is judged on its own grid
    coarse = train_stage("ssl", studies, tiny_settings(tmp_path, spacing="16,16,20"))
    assert "Dice" in coarse["published"][0]


@pytest.mark.usefixtures("plausible")
def test_scans_on_a_read_only_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State elsewhere (`home`, `model_dir`): said before anything is trained, and the training is not in vain."""
    studies, home = tiny_studies(tmp_path, cases=4, labelled=2), tmp_path / "home"
    settings = tiny_settings(tmp_path, home=str(home))
    access, before = os.access, label_hashes(studies)
    with monkeypatch.context() as patched:
        read_only = lambda path, mode: not Path(path).is_relative_to(studies) and access(path, mode)  # noqa: E731
        patched.setattr(os, "access", read_only)
        stages: list[str] = []
        patched.setattr(
            run.logger, "warning", lambda text, *args: stages.append("warned" if "cannot be written" in args[0] else "")
        )
        summary = run_round(studies, settings, lambda done, total, **shown: stages.append(shown.get("stage", "")))
    assert stages.index("warned") < stages.index("ssl")
    assert "labels/aslseg_pseudo cannot be written" in summary["warnings"][0]
    assert set(published_hashes(settings, studies)) == {"ssl", "sam", "adapter"}
    assert label_hashes(studies) == before
    second = run_round(studies, settings)
    assert not any("cannot be written" in warning for warning in second["warnings"])
    assert {name.partition("/")[0] for name in label_hashes(studies).keys() - before.keys()} >= {"original"}


def test_a_missing_sam_file_is_named(tmp_path: Path, quick: None) -> None:
    studies = tiny_studies(tmp_path, cases=2, labelled=1)
    with pytest.raises(BadWeightsError, match="sam_checkpoint"):
        run_round(studies, tiny_settings(tmp_path, sam_checkpoint=str(tmp_path / "none.safetensors")))
