"""What people do by day: labels that they delete, scans that they replace; and a pool that has nothing to promote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aslseg.cases.studies import FINAL, ORIGINAL, PSEUDO
from aslseg.errors import NotEnoughCasesError
from aslseg.rounds.feedback.late import REPLACED
from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion import canaries
from aslseg.rounds.promotion.decisions import why_nothing
from aslseg.rounds.run import run_round
from aslseg.settings import Paths, Settings
from tiny_rounds import Judged, label_hashes, published_hashes, tiny_settings, tiny_studies

TRAINED, DELETED, JUDGE = "phantom_000", "phantom_001", "phantom_002"
TABLE = f"case,patient,role\n{TRAINED},a,train\n{DELETED},b,train\n{JUDGE},c,validation\n"


def learned(summary: dict[str, object], kind: str) -> list[str]:
    """Cases of one kind that the last training of a round learned from."""
    models: dict[str, str] = summary["models"]  # type: ignore[assignment]
    inputs = json.loads(Path(models["retrained"]).with_name("inputs.json").read_text())
    return [case for case, *_ in inputs[kind]]


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    found = tiny_studies(tmp_path, cases=5)
    (found / "patients.csv").write_text(TABLE)
    return found


@pytest.fixture
def settings(tmp_path: Path, studies: Path) -> Settings:
    return tiny_settings(tmp_path, promote_fraction=1, promote_empty=1)


@pytest.mark.usefixtures("plausible")
def test_labels_that_were_deleted_are_not_learned_from_and_their_scans_are_unlabelled_again(
    studies: Path, settings: Settings, judged: Judged
) -> None:
    judged(lambda _: 0.5)
    run_round(studies, settings)
    for case in (DELETED, JUDGE):
        (studies / "labels" / FINAL / f"{case}.nii.gz").unlink()
    summary = run_round(studies, settings)
    assert learned(summary, "human") == [TRAINED]
    # without a new label or a judge, the published model stays, so that what was promoted is withdrawn
    assert DELETED in summary["withdrawn"], "a scan without a label, like others"
    assert JUDGE not in summary["withdrawn"] + learned(summary, "unlabelled"), "its patient has judged models"
    assert JUDGE in summary["decisions"]
    assert "no validation cases" in " ".join(summary["warnings"])
    assert f"{ORIGINAL}/{JUDGE}.nii.gz" in label_hashes(studies)
    assert verify_label_files(Paths(settings, studies)) == []


@pytest.mark.usefixtures("plausible")
def test_without_any_label_left_nothing_is_lost_and_one_line_says_what_to_do(
    studies: Path, settings: Settings, judged: Judged
) -> None:
    judged(lambda _: 0.5)
    run_round(studies, settings)
    models = published_hashes(settings, studies)
    for path in (studies / "labels" / FINAL).iterdir():
        path.rename(studies.parent / path.name)
    before = label_hashes(studies)
    with pytest.raises(NotEnoughCasesError, match="draw at least one label"):
        run_round(studies, settings)
    assert (label_hashes(studies), published_hashes(settings, studies)) == (before, models)
    for case in (TRAINED, DELETED, JUDGE):
        (studies.parent / f"{case}.nii.gz").rename(studies / "labels" / FINAL / f"{case}.nii.gz")
    assert run_round(studies, settings)["promoted"] == ["phantom_003", "phantom_004"]


@pytest.mark.usefixtures("plausible")
def test_the_mask_of_a_scan_that_was_replaced_is_not_learned_from(
    studies: Path, settings: Settings, judged: Judged, tmp_path: Path
) -> None:
    judged(lambda _: 0.5)
    first = run_round(studies, settings)
    assert first["promoted"] == ["phantom_003", "phantom_004"]
    old = Ledger(Paths(settings, studies).ledger).masks(PSEUDO)
    other = tiny_studies(tmp_path / "other", cases=1, labelled=0, seed=9)
    shutil.copy(other / "phantom_000.nii.gz", studies / "phantom_003.nii.gz")
    second = run_round(studies, settings)
    began = json.loads(Path(second["models"]["ssl"]).with_name("inputs.json").read_text())["promoted"]
    assert [case for case, *_ in began] == ["phantom_004"], "the old mask belongs to another scan"
    assert "phantom_003" in second["withdrawn"], "no label is new, so that the published model stays"
    now = Ledger(Paths(settings, studies).ledger).masks(PSEUDO)
    assert (now["phantom_003"].kind, now["phantom_003"].details["why"]) == ("removed", REPLACED)
    assert now["phantom_004"].details["sha256"] == old["phantom_004"].details["sha256"], "it stands again"
    assert verify_label_files(Paths(settings, studies)) == []


@pytest.mark.usefixtures("quick")
def test_where_no_scan_is_eligible_the_round_is_done_and_says_why(
    studies: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canaries, "FLOOR", 0.0)
    summary = run_round(studies, settings.model_copy(update={"promote_fraction": 0.0}))
    assert summary["promoted"] == summary["withdrawn"] == []
    paths = Paths(settings, studies)
    (row,) = Ledger(paths.ledger).rounds()
    assert row.state == "done"
    assert why_nothing(row)
    assert all(d["reasons"] for d in summary["decisions"].values())
    assert "Nothing was promoted." in (paths.reports / "round-1.html").read_text()
    assert published_hashes(settings, studies)
