"""The gate on the cases of a folder: by what has changed since the published model, on labels that are new to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.cases.studies import PSEUDO
from aslseg.compute.hardware import resolved
from aslseg.errors import TrainingDivergedError
from aslseg.files import sha256
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.models.published import find_published
from aslseg.rounds.folds import cross_fit as cross_fit_module
from aslseg.rounds.folds import cross_retrain
from aslseg.rounds.folds.cross_fit import cross_fit
from aslseg.rounds.folds.cross_retrain import own_mask
from aslseg.rounds.gate import publishing
from aslseg.rounds.gate.comparisons import (
    Compared,
    comparable,
    crossed_differences,
    first_entry,
    first_with_its_labels,
    settings_hash,
)
from aslseg.rounds.gate.publishing import publish_better
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.promotion import promotion
from aslseg.rounds.run import opened_pipeline, run_round, train_stage
from aslseg.rounds.steps.cases import trained_before
from aslseg.settings import Paths, Settings
from aslseg.types import no_progress
from tiny_rounds import Learned, Scored, Training, folds_one_by_one, published_hashes, tiny_settings, tiny_studies

TRAIN, JUDGE = ["phantom_000", "phantom_001", "phantom_002"], "phantom_003"
ROLES = "case,patient,role\n" + "".join(f"{case},{case},train\n" for case in TRAIN) + f"{JUDGE},{JUDGE},validation\n"


class Night:
    """A studies folder with three labels to learn from and one that judges; rounds without SAM and adapter on it."""

    def __init__(self, root: Path, folds: int = 2) -> None:
        self.studies, self.kept = tiny_studies(root, cases=7, labelled=7), root
        (self.studies / "patients.csv").write_text(ROLES)
        for n in range(4, 7):
            self.final(n).rename(root / f"phantom_{n:03d}.nii.gz")
        self.settings = tiny_settings(root, label_folds=folds)
        self.paths = Paths(self.settings, self.studies)
        self.ledger = Ledger(self.paths.ledger)

    def final(self, number: int) -> Path:
        return self.studies / "labels" / "final" / f"phantom_{number:03d}.nii.gz"

    def label(self, number: int) -> None:
        """A person labels one more scan."""
        shutil.copy(self.kept / f"phantom_{number:03d}.nii.gz", self.final(number))

    @property
    def served(self) -> str:
        return published_hashes(self.settings, self.studies)["ssl"]

    def publish(self, promoted: Sequence[str], settings: Settings | None = None) -> str:
        """Train with promoted masks, and what the gate says of the model."""
        stages, chosen = ("prepare", "ssl", "publish"), resolved(settings or self.settings)
        with opened_pipeline(self.studies, chosen, self.paths, no_progress, stages) as found:
            made = ModelSet({ModelKind.SSL: found.train_ssl([], no_progress)})
            maps = found.predict(ModelKind.SSL, made)
            cases = [own_mask(found, maps, c) for c in found.cases.unlabelled if c.id in promoted]
            retrained = found.train_ssl(cases, no_progress)
            crossed = cross_fit(found, no_progress)
            judged = crossed_differences(found, crossed, retrained, promoted, no_progress) if crossed else None
            kinds = (ModelKind.SSL,)
            _, (line,), _ = publish_better(found, made, retrained, promoted, no_progress, kinds, crossed=judged)
        return str(line)


@pytest.fixture
def night(tmp_path: Path, trainings: list[Training]) -> Night:
    return Night(tmp_path)


@pytest.mark.parametrize(("gain", "published"), [(-0.02, False), (0.004, False), (0.02, True)])
def test_other_promoted_masks_have_to_be_better(
    night: Night, scored: Scored, trainings: list[Training], gain: float, published: bool
) -> None:
    """Four labels judge: three by models of the folds that were retrained without them, and the validation case."""
    scored(lambda learned, _: 0.8 + gain * len(learned.promoted))
    night.publish(["phantom_004"])
    served, more = night.served, ["phantom_004", "phantom_005"]
    line = night.publish(more)
    # with masks that make it worse the first model was published without any
    change = gain * (2 if gain < 0 else 1)
    assert f"mean difference of Dice {change:+.4f} on 4 human labels; 0.0060 is asked" in line
    assert line.startswith("ssl: published; no human label is new") == published
    assert (night.served != served) == published
    trainings.clear()
    again = night.publish(more)
    assert again == ("ssl: unchanged [retrained]" if published else line), "the same inputs, the same decision"
    assert not trainings, "and nothing is trained for it"


def test_with_two_labels_other_masks_are_never_published(tmp_path: Path, trainings: Any, scored: Scored) -> None:
    night = Night(tmp_path, folds=0)
    scored(lambda learned, _: 0.5 + 0.1 * len(learned.promoted))
    night.publish(["phantom_004"])
    served = night.served
    assert "1 to compare on is too few" in night.publish(["phantom_004", "phantom_005"])
    assert night.served == served


def test_the_same_scans_with_other_masks_are_judged_by_validation_cases_alone(night: Night, scored: Scored) -> None:
    scored(lambda *_: 0.8)
    night.publish(["phantom_004"])
    other = night.settings.model_copy(update={"seed": 5})
    assert "ssl: published (Dice 0.8000, published 0.8000 on 1 validation cases)" in night.publish(
        ["phantom_004"], other
    )
    with opened_pipeline(night.studies, resolved(other), night.paths, no_progress, ("prepare",)) as found:
        crossed = cross_fit(found, no_progress)
        assert crossed is not None
        ssl = found.train_ssl([], no_progress)
        assert crossed_differences(found, crossed, ssl, ["phantom_004"], no_progress) == Compared()


def test_candidates_are_held_against_the_first_model_with_the_same_labels(night: Night, scored: Scored) -> None:
    """Each night's model might be a little worse than the one before, and pass by luck."""
    scored(lambda learned, _: 0.8 + 0.04 * len(learned.promoted))
    night.settings = night.settings.model_copy(update={"keep_models": 1})
    night.publish([])
    first = night.served
    night.publish(["phantom_004"])
    second = night.served
    more = ["phantom_004", "phantom_005"]
    with opened_pipeline(night.studies, resolved(night.settings), night.paths, no_progress, ("prepare",)) as found:
        crossed, current = cross_fit(found, no_progress), comparable(found, ModelKind.SSL)
        assert crossed is not None
        assert current is not None
        assert (current.sha256, first_with_its_labels(found, current)[0].sha256) == (second, first)
        judged = crossed_differences(found, crossed, found.train_ssl([], no_progress, part=0.5), more, no_progress)
        assert judged.published == pytest.approx(dict.fromkeys(TRAIN, 0.04))
        assert judged.first == pytest.approx(dict.fromkeys(TRAIN, 0.08))
    assert "ssl: published; no human label is new" in night.publish(more)
    assert find_published(night.paths, ModelKind.SSL, entries={"ssl": first_event(night)}), "its file is kept"
    # a new label: what is published then is the first one again
    night.label(4)
    night.publish(["phantom_005", "phantom_006"])
    assert first_event(night)["sha256"] == night.served != first


def first_event(night: Night) -> dict[str, Any]:
    entry, _ = first_entry(night.ledger.events(kinds=("published",)), ModelKind.SSL)
    assert entry is not None
    return entry


@pytest.mark.parametrize(("change", "published"), [(-0.2, False), (-0.02, True), (0.0, True)])
def test_with_new_labels_a_model_is_published_unless_it_is_shown_to_be_worse(
    tmp_path: Path, trainings: Any, scored: Scored, change: float, published: bool
) -> None:
    """The validation case and the new labels judge; not one whose scan the published model saw with a promoted mask."""
    night, first = Night(tmp_path), Learned(frozenset(TRAIN), frozenset({"phantom_006"}))
    scored(lambda learned, _: 0.8 if learned == first else 0.8 + change)
    night.publish(["phantom_006"])
    served = night.served
    for number in (4, 5, 6):
        night.label(number)
    line = night.publish([])
    assert f"mean difference of Dice {change:+.4f} on 3 human labels)" in line
    assert line.startswith("ssl: published; human labels are new") == published
    assert ("this model is shown to be worse" in line) == (not published)
    assert (night.served != served) == published


def test_a_fold_that_learned_fewer_labels_than_the_published_model_is_left_out(night: Night, scored: Scored) -> None:
    scored(lambda learned, _: 0.5 + 0.1 * len(learned.human))
    night.publish([])
    night.label(4)
    # two folds of two: their models learned two labels, the published one three
    assert "mean difference of Dice +0.1000 on 1 human label)" in night.publish([])


def test_a_corrected_label_counts_as_a_new_one(night: Night, scored: Scored) -> None:
    scored(lambda *_: 0.8)
    night.publish([])
    served = night.served
    shutil.copy(night.final(1), night.final(0))  # drawn anew
    line = night.publish(["phantom_004"])
    assert "human labels are new, and this model is not shown to be worse (mean difference of Dice +0.0000 on 1" in line
    assert night.served != served


def test_a_mask_that_people_took_back_does_not_keep_its_model(night: Night, scored: Scored) -> None:
    scored(lambda *_: 0.8)
    about = {"sha256": "1", "agreement": {}, "threshold": {}, "models": {}}
    night.ledger.append([Entry("mask", 1, "phantom_004", PSEUDO, about)])
    night.publish(["phantom_004"])
    served = night.served
    assert "not shown to be better" in night.publish(["phantom_005"])
    removed = Entry("removed", None, "phantom_004", PSEUDO, {"was": "1"})
    night.ledger.append([removed, Entry("veto", None, "phantom_004", PSEUDO, about)])
    assert "not shown to be worse (mean difference of Dice +0.0000 on 4 human labels)" in night.publish(["phantom_005"])
    assert night.served != served


@pytest.mark.parametrize("start", [2, 4, 8])
def test_labels_that_arrive_one_by_one_are_learned_each_night(
    tmp_path: Path, trainings: Any, scored: Scored, start: int
) -> None:
    """The frozen gate: a first model that was lucky with its judge, and nothing was published ever again."""
    studies, settings = tiny_studies(tmp_path, cases=9, labelled=9), tiny_settings(tmp_path)
    final = studies / "labels" / "final"
    waiting = sorted(final.iterdir())[start - 1 :]
    kept = {path: path.read_bytes() for path in waiting}
    for path in waiting:
        path.unlink()
    paths, first = Paths(settings, studies), set()

    def score(learned: Learned, case: str) -> float:
        return 0.84 if learned.human == first else 0.8

    scored(score)
    for new in [None, *waiting]:
        if new is not None:
            new.write_bytes(kept[new])
        before = find_published(paths, ModelKind.SSL)
        line = train_stage("ssl", studies, settings)["published"][0]
        model, judges = find_published(paths, ModelKind.SSL), Ledger(paths.ledger).validation_patients()
        assert model is not None
        assert model.labels is not None
        first = first or set(model.labels)
        assert not trained_before(Ledger(paths.ledger), paths) & judges, "nobody judges who was ever learned from"
        labels = {p.name.removesuffix(".nii.gz") for p in final.iterdir()}
        assert model.labels.keys() | judges == labels, f"every label is learned, or judges: {line}"
        learned_more = before is not None and model.labels != before.labels
        assert before is None or (model.sha256 != before.sha256) == learned_more


def test_a_fold_is_retrained_with_masks_of_its_own_model_and_sees_none_of_its_labels(
    night: Night, scored: Scored, trainings: list[Training]
) -> None:
    scored(lambda learned, _: 0.8 + 0.01 * len(learned.promoted))
    night.settings = night.settings.model_copy(update={"uncertainty_weight": 0.1})
    night.publish(["phantom_004"])
    trainings.clear()
    night.publish(["phantom_004", "phantom_005"])
    steps = night.paths.rounds / "steps"
    models = {sha256(p): json.loads(p.with_name("inputs.json").read_text()) for p in steps.glob("ssl-*/*.safetensors")}
    folds = [(human, promoted) for human, promoted in trainings if len(human) < 3]
    # for each of the two folds, with the cases of tonight and with those of the published model
    assert sorted(len(promoted) for _, promoted in folds) == [1, 1, 2, 2]
    left_out = [set(TRAIN) - human.keys() for human, _ in folds]
    assert sorted(case for out in left_out for case in out) == sorted(TRAIN * 2)
    for human, promoted in folds:
        assert JUDGE not in human
        for case in promoted.values():
            made = json.loads((Path(case.label.filename).with_name("inputs.json")).read_text())
            drawn = steps / made["maps"]
            model = models[json.loads((drawn / "inputs.json").read_text())["ssl"]]
            assert {i for i, *_ in model["human"]} == human.keys(), "the mask is of the model without the fold"
            assert model["promoted"] == []
            with np.load(next(drawn.glob(f"{case.id}-*.npz"))) as file:
                regions = file["regions"].astype(np.float32) / np.float32(255)
            np.testing.assert_array_equal(case.label, night.settings.label_set.decode(regions))
            assert case.weight == night.settings.promote_weight
            expected = 1 - 0.9 * (1 - np.abs(2 * regions - 1).min(0))
            np.testing.assert_allclose(case.voxel_weight, expected, atol=1e-3)


@pytest.mark.usefixtures("plausible")
@pytest.mark.parametrize(("change", "published"), [(-0.2, False), (-0.02, True)])
def test_with_four_folds_new_labels_are_judged_on_all_labels_that_are_not_new(
    tmp_path: Path,
    trainings: Any,
    scored: Scored,
    monkeypatch: pytest.MonkeyPatch,
    change: float,
    published: bool,
) -> None:
    """Models of folds train half the steps, so that they are compared with those of the published model's round."""

    def out_of_fold(pipeline: Any, maps: Any, case: Any) -> dict[str, float]:
        return dict.fromkeys(pipeline.labels.names, pipeline.dice(maps, [case]))

    monkeypatch.setattr(cross_fit_module, "region_dice", out_of_fold)

    def score(learned: Learned, case: str) -> float:
        """The label of phantom_005 is bad; the one validation case happens not to show it."""
        return 0.8 + (change if "phantom_005" in learned.human and case != JUDGE else 0)

    scored(score)
    night = Night(tmp_path, folds=4)
    night.label(4)
    run_round(night.studies, night.settings)
    served = night.served
    night.label(5)
    line = run_round(night.studies, night.settings)["published"][0]
    # three or two of four models have learned the new label; the validation case sees no difference
    assert line.startswith("ssl: published; human labels are new") == published
    assert "on 5 human labels" in line
    assert (night.served != served) == published
    if published:
        night.label(6)
        other = night.settings.model_copy(update={"seed": 5})
        assert "on 1 human label)" in run_round(night.studies, other)["published"][0], "folds of other settings"


@pytest.mark.usefixtures("plausible")
def test_a_whole_round_is_withdrawn_when_its_masks_do_not_help(
    tmp_path: Path, trainings: list[Training], scored: Scored
) -> None:
    scored(lambda learned, _: (0.8, 0.81, 0.78)[len(learned.promoted)])
    night = Night(tmp_path)
    settings = night.settings.model_copy(update={"promote_cases": 1, "promote_fraction": 1.0})
    first = run_round(night.studies, settings)
    standing = night.ledger.masks(PSEUDO)
    second = run_round(night.studies, settings.model_copy(update={"promote_cases": 2}))
    assert "no human label is new, and this model is not shown to be better" in second["published"][0]
    assert "-0.0300 on 4 human labels" in second["published"][0]
    assert "compare" in second["measured"]
    assert (second["promoted"], len(second["withdrawn"])) == ([], 2)
    assert [p.case for p in night.ledger.promotions()] == first["promoted"]
    hashes = {c: e.details["sha256"] for c, e in night.ledger.masks(PSEUDO).items() if e.kind == "mask"}
    assert hashes == {c: e.details["sha256"] for c, e in standing.items() if e.kind == "mask"}
    with opened_pipeline(night.studies, resolved(settings), night.paths, no_progress, ("prepare",)) as found:
        current = comparable(found, ModelKind.SSL)
        assert current is not None
        assert first_with_its_labels(found, current)[1] == 2, "the model of the second round was the first candidate"


def test_a_round_that_was_killed_after_it_published_decides_the_same_again(
    tmp_path: Path, trainings: list[Training], scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model without promoted masks is better, and is published; the round is killed before it withdraws these."""
    scored(lambda learned, _: 0.8 - 0.1 * len(learned.promoted))
    night = Night(tmp_path, folds=0)
    settings = night.settings.model_copy(update={"promote_cases": 1, "promote_fraction": 1.0})
    night.publish([])
    night.label(4)
    with monkeypatch.context() as killed:
        killed.setattr(promotion, "settle_promotions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_round(night.studies, settings)
    (event,) = night.ledger.events(kinds=("published",), number=1)
    summary = run_round(night.studies, settings)
    assert summary["continued"]
    assert summary["published"] == event.details["why"]
    assert "ssl: published; human labels are new" in summary["published"][0]
    assert night.ledger.events(kinds=("published",), number=1) == [event]


def test_floors_and_folds_are_among_the_settings_that_the_gate_compares(night: Night) -> None:
    def known(**conf: object) -> str:
        chosen = resolved(tiny_settings(night.kept, **conf))
        with opened_pipeline(night.studies, chosen, night.paths, no_progress, ("prepare",)) as found:
            return settings_hash(found)

    assert known(promote_floor="0.5") != known(promote_floor="0.6")
    # limits on components and the errors that SAM learns to correct come from the folds
    assert known(label_folds=0) != known(label_folds=2)
    assert known(label_folds=4) == known(label_folds="auto")


def test_a_fold_whose_retraining_diverges_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, without: Any, **__: Any) -> Path:
        if without == ["a"]:
            raise TrainingDivergedError("loss is nan")
        return Path("model")

    cases = SimpleNamespace(
        unlabelled=[SimpleNamespace(id="u")],
        train=[SimpleNamespace(id=c, patient=c) for c in "ab"],
        warnings=[],
    )
    pipeline: Any = SimpleNamespace(
        cases=cases,
        settings=SimpleNamespace(most_folds=2),
        train_ssl=train,
        predict=lambda *_: None,
        dice=lambda *_: 0.8,
    )
    pipeline.train_folds = folds_one_by_one(pipeline)
    parts = [SimpleNamespace(cases=[c], maps=None, limits={}) for c in cases.train]
    crossed: Any = SimpleNamespace(folds=parts, parts=[["a"], ["b"]])
    monkeypatch.setattr(cross_retrain, "own_mask", lambda *_: None)
    assert cross_retrain.retrained_dice(pipeline, crossed, ["u"], no_progress) == {"b": 0.8}
    (warning,) = cases.warnings
    assert "no retrained model without a (loss is nan)" in warning


def test_models_of_another_grid_replace_none_of_a_set_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SSL model stays, on its 2 mm; neither SAM nor the adapter is published, which were made for 3 mm."""
    asked: list[tuple[ModelKind, bool]] = []

    class Kept(ModelSet):
        spacing = (2.0, 2.0, 2.0)

    def decide(_: Any, candidate: Any, __: Any, foreign: bool) -> tuple[bool, str]:
        asked.append((candidate.kind, foreign))
        return False, "not published"

    made = Kept({kind: tmp_path / str(kind) for kind in ModelKind})
    for name, value in {
        "_candidate_ssl": lambda *_: tmp_path / "ssl",
        "_promoted_before": lambda *_: (),
        "comparable": lambda *_: SimpleNamespace(path=tmp_path / "old"),
        "entries_before": lambda *_: {},
        "_score": lambda _, kind, *__: SimpleNamespace(kind=kind, path=tmp_path, dice=None, published_dice=None),
        "_held_against_first": lambda _, candidate, *__: candidate,
        "_decide": decide,
        "_ssl_maps": lambda *_: None,
        "_about_ssl": lambda _, line, *__: line,
        "_serve": lambda *_: None,
    }.items():
        monkeypatch.setattr(publishing, name, value)
    monkeypatch.setattr(ModelSet, "with_file", lambda self, *_: self)
    cases = SimpleNamespace(spacing=(3.0, 3.0, 3.0), warnings=[])
    publish_better(SimpleNamespace(cases=cases, dice=lambda *_: None), made, tmp_path / "ssl", [], no_progress)
    assert asked == [(ModelKind.SSL, False), (ModelKind.SAM, True), (ModelKind.ADAPTER, True)]


def test_a_round_that_was_rejected_without_masks_is_a_try_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for number, summary in enumerate(
        ({"rejected": True, "withdrawn": []}, {"rejected": False}, {"withdrawn": ["a"]}), 1
    ):
        ledger.append([Entry("opened", number)])
        ledger.close_round(number, summary)
    current: Any = SimpleNamespace(kind=ModelKind.SSL)
    assert first_with_its_labels(SimpleNamespace(ledger=ledger, number=None), current) == (current, 3)
