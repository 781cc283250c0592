"""The gate in whole rounds: by what has changed since the published model, on labels that it has not learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.models.published import find_published
from aslseg.rounds import pipeline
from aslseg.rounds.cases import trained_before
from aslseg.rounds.ledger import Ledger
from aslseg.rounds.rollback import roll_back_case
from aslseg.rounds.run import run_round, train_stage
from aslseg.settings import Paths, Settings
from tiny_rounds import Learned, Scored, published_hashes, tiny_settings, tiny_studies

ROLES = "case,patient,role\n" + "".join(
    f"phantom_{n:03d},p{n},{'validation' if n == 3 else 'train'}\n" for n in range(4)
)
SHORT = {"ssl_iterations": 1, "retrain_iterations": 1, "sam_iterations": 1, "adapter_iterations": 1}


def folder(root: Path, labelled: int = 4, folds: int = 2, **conf: object) -> tuple[Path, Settings]:
    """Three labels to learn from, one that judges, and unlabelled scans of which one is promoted."""
    studies = tiny_studies(root, cases=7, labelled=7)
    (studies / "patients.csv").write_text(ROLES)
    for n in range(labelled, 7):
        (studies / "labels" / "final" / f"phantom_{n:03d}.nii.gz").rename(root / f"phantom_{n:03d}.nii.gz")
    values = SHORT | {"label_folds": folds, "promote_cases": 1, "promote_fraction": 1} | conf
    return studies, tiny_settings(root, **values)


def label(root: Path, studies: Path, number: int) -> None:
    """A person labels one more scan."""
    shutil.copy(root / f"phantom_{number:03d}.nii.gz", studies / "labels" / "final")


@pytest.mark.usefixtures("plausible")
@pytest.mark.parametrize(("gain", "published"), [(-0.02, False), (0.004, False), (0.02, True)])
def test_other_promoted_masks_have_to_be_better(tmp_path: Path, scored: Scored, gain: float, published: bool) -> None:
    """Four labels judge: three by models of the folds that were retrained without them, and the validation case."""
    scored(lambda learned, _: 0.8 + gain * (len(learned.promoted) - 1 if learned.promoted else 0))
    studies, settings = folder(tmp_path)
    first = run_round(studies, settings)
    served = published_hashes(settings, studies)["ssl"]
    assert len(first["promoted"]) == 1
    more = settings.model_copy(update={"promote_cases": 2})  # says nothing of how models are trained
    second = run_round(studies, more)
    line = second["published"][0]
    assert f"mean difference of Dice {gain:+.4f} on 4 human labels; 0.0060 is asked" in line
    assert (line.startswith("ssl: published"), published_hashes(settings, studies)["ssl"] != served) == (published,) * 2
    assert len(second["promoted"]) == (2 if published else 1)
    assert len(second["withdrawn"]) == (0 if published else 2)
    assert "compare" in second["measured"]
    if not published:  # the same inputs, the same decision, and nothing is trained for it
        again = run_round(studies, more)
        assert again["published"][0] == line
        assert "compare" not in again["measured"]


@pytest.mark.usefixtures("plausible")
def test_with_two_labels_other_masks_are_never_published(tmp_path: Path, scored: Scored) -> None:
    scored(lambda learned, _: 0.5 + 0.1 * len(learned.promoted))
    studies, settings = folder(tmp_path, folds=0)
    run_round(studies, settings)
    served = published_hashes(settings, studies)["ssl"]
    second = run_round(studies, settings.model_copy(update={"promote_cases": 2}))
    assert "1 to compare on is too few" in second["published"][0]
    assert published_hashes(settings, studies)["ssl"] == served


@pytest.mark.usefixtures("plausible")
@pytest.mark.parametrize(("change", "published"), [(-0.2, False), (-0.03, True), (0.0, True)])
def test_with_new_labels_a_model_is_published_unless_it_is_shown_to_be_worse(
    tmp_path: Path, scored: Scored, change: float, published: bool
) -> None:
    """The validation case and the new labels judge; of these the ones whose fold's model learned no fewer labels."""
    scored(lambda learned, _: 0.8 + change * bool(learned.human & {"phantom_004", "phantom_005"}))
    studies, settings = folder(tmp_path, folds=5)
    assert run_round(studies, settings)["promoted"] == ["phantom_006"] or True
    served = published_hashes(settings, studies)["ssl"]
    learned = trained_before(Ledger(Paths(settings, studies).ledger), Paths(settings, studies))
    for number in (4, 5, 6):
        label(tmp_path, studies, number)
    line = run_round(studies, settings)["published"][0]
    new = {"phantom_004", "phantom_005", "phantom_006"} - learned
    assert len(new) == 2, "the third was promoted and learned"
    assert f"on {1 + len(new)} human labels" in line
    assert line.startswith("ssl: published; human labels are new") == published
    assert ("this model is worse" in line) == (not published)
    assert (published_hashes(settings, studies)["ssl"] != served) == published


@pytest.mark.usefixtures("plausible")
def test_a_fold_s_model_that_learned_fewer_labels_is_not_compared(tmp_path: Path, scored: Scored) -> None:
    scored(lambda learned, _: 0.5 + 0.1 * len(learned.human))
    studies, settings = folder(tmp_path, promote_threshold="1")
    run_round(studies, settings)
    label(tmp_path, studies, 4)
    # two folds of two: their models learned two labels, the published one three
    line = run_round(studies, settings)["published"][0]
    assert "mean difference of Dice +0.1000 on 1 human label)" in line


@pytest.mark.usefixtures("quick")
def test_labels_that_arrive_one_by_one_are_learned_each_night(tmp_path: Path, scored: Scored) -> None:
    """The frozen gate: one lucky judge, and nothing was published ever again."""
    lucky: list[Learned] = []

    def score(learned: Learned, case: str) -> float:
        lucky.append(learned)
        return 0.85 if learned == lucky[0] else 0.8

    scored(score)
    studies, settings = folder(tmp_path, labelled=1, **SHORT)
    (studies / "patients.csv").unlink()
    paths, served = Paths(settings, studies), []
    for labels in range(1, 8):
        if labels > 1:
            label(tmp_path, studies, labels - 1)
        train_stage("ssl", studies, settings)
        model, judges = find_published(paths, "ssl"), Ledger(paths.ledger).validation_patients()  # type: ignore[arg-type]
        assert model is not None
        assert model.labels is not None
        learned = trained_before(Ledger(paths.ledger), paths)
        assert not learned & judges, "nobody judges who was ever learned from"
        assert len(model.labels) + len(judges) == labels, "every label is learned, or judges"
        served.append(model.sha256)
    assert len(judges) >= 1
    assert len(set(served)) == 7 - len(judges)


@pytest.mark.usefixtures("plausible")
def test_a_mask_that_people_took_back_does_not_keep_its_model(tmp_path: Path, scored: Scored) -> None:
    scored(lambda *_: 0.8)
    studies, settings = folder(tmp_path, promote_cases=2)
    first = run_round(studies, settings)
    served = published_hashes(settings, studies)["ssl"]
    roll_back_case(Paths(settings, studies), first["promoted"][0])
    line = run_round(studies, settings)["published"][0]
    assert "not shown to be worse" in line
    assert published_hashes(settings, studies)["ssl"] != served


@pytest.mark.usefixtures("plausible")
def test_a_fold_is_retrained_with_masks_of_its_own_model_and_sees_none_of_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings = folder(tmp_path, uncertainty_weight=0.1)
    run_round(studies, settings)
    trained: list[tuple[dict[str, np.ndarray], dict[str, Any]]] = []
    train = pipeline.training.train

    def watched(labelled: Any, unlabelled: Any, *rest: Any, **more: Any) -> Any:
        assert all(c.label is None for c in unlabelled)
        human = {c.id: np.array(c.label) for c in labelled if c.voxel_weight is None}
        promoted = {c.id: c for c in labelled if c.voxel_weight is not None}
        trained.append((human, promoted))
        return train(labelled, unlabelled, *rest, **more)

    monkeypatch.setattr(pipeline.training, "train", watched)
    summary = run_round(studies, settings.model_copy(update={"promote_cases": 2}))
    steps = Paths(settings, studies).rounds / "steps"
    own = {p.name.split(".")[0]: p.parent for p in steps.glob("own_mask-*/*.label.npy")}
    folds = [(human, promoted) for human, promoted in trained if len(human) < 3]
    # for each of the two folds, with the cases of tonight and with those of the published model
    assert sorted(len(promoted) for _, promoted in folds) == [1, 1, 2, 2]
    left_out = [{"phantom_000", "phantom_001", "phantom_002"} - human.keys() for human, _ in folds]
    assert sorted(c for out in left_out for c in out) == sorted(["phantom_000", "phantom_001", "phantom_002"] * 2)
    for human, promoted in folds:
        assert "phantom_003" not in human, "the validation case"
        for case in promoted.values():
            name = Path(case.label.filename).name.split(".")[0]
            inputs = json.loads((own[name] / "inputs.json").read_text())
            made_by = json.loads((steps / inputs["maps"] / "inputs.json").read_text())["ssl"]
            (model,) = [
                json.loads(p.with_name("inputs.json").read_text())
                for p in steps.glob("ssl-*/ssl.safetensors")
                if _sha(p) == made_by
            ]
            assert {i for i, *_ in model["human"]} == human.keys(), "the mask is of the model without the fold"
            assert model["promoted"] == []
            with np.load(next((steps / inputs["maps"]).glob(f"{case.id}-*.npz"))) as file:
                expected = settings.label_set.decode(file["regions"].astype(np.float32) / np.float32(255))
            np.testing.assert_array_equal(case.label, expected)
            assert case.weight == settings.promote_weight
            assert 0.09 < float(case.voxel_weight.min()) <= 1
    assert "compare" in summary["measured"]
    assert len(summary["out_of_fold"]["cases"]) == 3


def _sha(path: Path) -> str:
    from aslseg.files import sha256

    return sha256(path)
