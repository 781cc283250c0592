"""What human labels say of masks on which both networks agree, and that it decides what is promoted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from aslseg.agreement.promise import Pair
from aslseg.cases.prepared_case import Prepared
from aslseg.cases.studies import Case
from aslseg.errors import TrainingDivergedError
from aslseg.models.cascade import StageOutput
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.folds.cross_fit import cross_fit
from aslseg.rounds.folds.evidence import (
    Evidence,
    Floors,
    Scored,
    cascade_sources,
    first_model,
    gather,
    judge_labels,
    mix_sources,
)
from aslseg.rounds.folds.fold_share import fold_share
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.promotion.promotion import assess
from aslseg.rounds.promotion.state import RoundState
from aslseg.rounds.recipes.aslseg import choose_source, choose_sources, no_worse, promotable
from aslseg.rounds.recipes.cfr import promote_all
from aslseg.rounds.scheduling.progress import Progress
from aslseg.rounds.steps.cases import RoundCases
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.settings import Paths
from aslseg.types import Labels, Volume, no_progress
from aslseg.volume.geometry import Grid
from tiny_rounds import folds_one_by_one, tiny_settings

SHAPE = (40, 32, 16)
LABELS = Labels.parse("liver,tumour", "tumour:liver")
Drawn = Callable[[Prepared], np.ndarray]


def truth(n: int) -> np.ndarray:
    """A liver on one side of the scan with a tumour in it; both move a little from case to case."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[4 + n % 3 : 19 + n % 2, 6 : 22 + n % 4, 3:13] = 1
    mask[8 + n % 3 : 12 + n % 3, 9 + n % 4 : 13 + n % 4, 5:9] = 2
    return mask


def case_of(n: int, labelled: bool) -> Prepared:
    image = np.full(SHAPE, 0.5, np.float32)
    grid = Grid.of(Volume(image, np.eye(4)), None)
    label = truth(n) if labelled else None
    return Prepared(f"case{n}", f"p{n}", image, grid, label, image_hash=f"{n:064}", label_hash=str(n))


class Night:
    """A round whose networks draw what a test says, on two unlabelled scans.

    ``drawn`` makes the mask of a network that was not trained on the case; SAM and the adaptation network agree with
    it.
    """

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        drawn: Drawn,
        train: int = 5,
        validation: int = 1,
        **conf: Any,
    ) -> None:
        conf = {"label_folds": "auto", "promote_floor": "auto", "promote_fraction": 1} | conf
        settings = tiny_settings(root, **conf)
        cases = RoundCases(
            None,
            train=[case_of(n, True) for n in range(train)],
            validation=[case_of(n, True) for n in range(train, train + validation)],
            unlabelled=[case_of(n, False) for n in range(20, 22)],
        )
        everything = [*cases.train, *cases.predicted]
        cases.sources = {c.id: Case(c.id, root / c.id, c.patient, "train") for c in everything}
        self.pipeline = RoundPipeline(
            Paths(settings, root), settings, Ledger(root / "ledger.sqlite"), cases, Progress(root / "p.json", {}), 1
        )
        self.trained: list[set[str]] = []

        def train_ssl(promoted: Any, report: Any, without: Any = (), part: float = 1.0) -> Path:
            self.trained.append({c.id for c in cases.train} - set(without))
            path = root / f"ssl{len(self.trained)}"
            path.write_text(str(sorted(self.trained[-1])))
            return path

        def predict(kind: ModelKind, models: ModelSet) -> Any:
            return Known(root / f"{kind}-{models[ModelKind.SSL].name}", drawn)

        monkeypatch.setattr(self.pipeline, "train_ssl", train_ssl)
        monkeypatch.setattr(self.pipeline, "train_folds", folds_one_by_one(self.pipeline))
        monkeypatch.setattr(self.pipeline, "predict", predict)
        monkeypatch.setattr(self.pipeline, "consensus", lambda first, second: first)
        self.root = root

    def run(self, promote: Any = promotable) -> tuple[RoundState, dict[str, dict[str, Any]]]:
        """The round's state and what it wants to promote."""
        p = self.pipeline
        ssl = p.train_ssl([], no_progress)
        models = ModelSet(dict.fromkeys((ModelKind.SSL, ModelKind.SAM, ModelKind.ADAPTER), ssl))
        sources = cascade_sources(p, models)
        evidence = gather(p, cross_fit(p, no_progress), models, sources)
        source = choose_source(evidence, ("ssl", "adapter", "consensus"))
        floors = judge_labels(evidence, source, p.settings.floors, p.labels)
        state = RoundState(p, models, sources["ssl"], sources["adapter"], source, sources[source], evidence, floors)
        assess(state, no_progress)
        return state, promote(state, no_progress)


class Known:
    """Region probabilities of known masks."""

    labels = LABELS

    def __init__(self, folder: Path, drawn: Drawn) -> None:
        self.folder, self.drawn = folder, drawn

    def __call__(self, case: Prepared) -> np.ndarray:
        return self.output(case).regions

    def output(self, case: Prepared) -> StageOutput:
        return StageOutput(self.labels.regions(self.drawn(case)).astype(np.float32))

    def has(self, case: Prepared) -> bool:
        return False


def true_mask(case: Prepared) -> np.ndarray:
    return truth(int(case.id.removeprefix("case")))


def moved(case: Prepared, mm: int = 6) -> np.ndarray:
    return np.roll(true_mask(case), mm, axis=0)


def eroded(case: Prepared) -> np.ndarray:
    mask = true_mask(case)
    return np.where(ndimage.binary_erosion(mask > 0, iterations=2), mask, 0).astype(np.uint8)


def dilated(case: Prepared) -> np.ndarray:
    mask = true_mask(case)
    return np.where(mask > 0, mask, ndimage.binary_dilation(mask > 0, iterations=4)).astype(np.uint8)


SHARED_ERRORS: dict[str, Drawn] = {
    "flipped left-right": lambda case: true_mask(case)[::-1],
    "flipped front-back": lambda case: np.roll(true_mask(case)[:, ::-1], 6, 1),
    "shifted": moved,
    "eroded": eroded,
    "dilated": dilated,
    "of another scan": lambda case: np.swapaxes(true_mask(case)[:32, :32], 0, 1).repeat(2, 0)[:40],
}


@pytest.mark.parametrize("error", SHARED_ERRORS)
def test_an_error_that_both_networks_share_is_not_promoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    night = Night(tmp_path, monkeypatch, SHARED_ERRORS[error])
    state, promoted = night.run()
    assert all(found.agreement.mean == 1 for found in state.assessments.values())
    assert not promoted
    (reason,) = [r for r in state.refused["case20"] if r.startswith("liver: Dice ")]
    assert reason.endswith(" on 6 human labels that were not trained on, floor 0.8 (promote_floor)")
    # the floor is what keeps it from being promoted
    without = Night(tmp_path, monkeypatch, SHARED_ERRORS[error], promote_floor="0", promote_threshold="0.9")
    assert len(without.run()[1]) == 2


def test_right_masks_are_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night = Night(tmp_path, monkeypatch, true_mask)
    state, promoted = night.run()
    assert list(promoted) == ["case20", "case21"]
    assert state.floors.reasons == {}
    assert "unknown" not in promoted["case20"]
    assert state.floors.about["liver"] == {"dice": 1.0, "cases": 6, "floor": 0.8, "reason": None}
    # four folds, and each model has seen nothing of its fold
    assert sorted(map(len, night.trained)) == [3, 4, 4, 4, 5]


def test_a_vessel_that_both_call_tumour_is_left_open_and_the_liver_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vessel(case: Prepared) -> np.ndarray:
        mask = np.minimum(true_mask(case), 1)
        mask[14:17, 8:20, 9:12] = 2
        return mask

    night = Night(tmp_path, monkeypatch, vessel, promote_threshold="0.9,tumour=0.7")
    state, promoted = night.run()
    assert state.floors.unknown == ("tumour",)
    assert list(promoted) == ["case20", "case21"]
    assert promoted["case20"]["unknown"] == ["tumour"]
    assert state.floors.notes == (
        "not learned from it: tumour: Dice 0.00 on 6 human labels that were not trained on, floor 0.65 (promote_floor)",
    )
    case = night.pipeline.cases.unlabelled[0]
    learned = night.pipeline.promoted(case, promoted["case20"])
    # 3 = 2 labels + 1 + liver's index: the liver or anything in it
    np.testing.assert_array_equal(learned.case.label, np.where(vessel(case) > 0, 3, 0))
    plain = night.pipeline.promoted(case, {k: v for k, v in promoted["case20"].items() if k != "unknown"})
    assert plain.key != learned.key
    assert set(np.unique(plain.case.label)) == {0, 1, 2}


def test_networks_may_disagree_on_what_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night = Night(tmp_path, monkeypatch, lambda case: np.minimum(true_mask(case), 1), promote_threshold="0.9")
    predict = night.pipeline.predict

    def other_tumour(kind: ModelKind, models: ModelSet) -> Any:
        found = predict(kind, models)
        if kind == ModelKind.ADAPTER:
            found.drawn = lambda case: np.where(moved(case, 4) == 2, 2, np.minimum(true_mask(case), 1)).astype(np.uint8)
        return found

    monkeypatch.setattr(night.pipeline, "predict", other_tumour)
    state, promoted = night.run()
    assert state.assessments["case20"].agreement.per_label["tumour"] == 0
    assert state.assessments["case20"].of_learned.per_label == {"liver": 1.0}
    assert list(promoted) == ["case20", "case21"]
    assert not state.differs(night.pipeline.cases.unlabelled[0]).any()


def test_without_evidence_nothing_is_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night = Night(tmp_path, monkeypatch, true_mask, train=1, validation=0)
    state, promoted = night.run()
    assert not promoted
    assert state.refused["case20"] == [
        "liver: no human label that was not trained on shows how good its masks are (promote_floor 0.8); label one "
        "more patient who has it"
    ]
    assert night.trained == [{"case0"}]


def test_cfr_promotes_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Night(tmp_path, monkeypatch, true_mask).run(promote_all)[1]) == 2
    state, promoted = Night(tmp_path, monkeypatch, moved).run(promote_all)
    assert not promoted
    assert "floor 0.8 (promote_floor)" in state.refused["case21"][0]


def test_a_fold_whose_training_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    night = Night(tmp_path, monkeypatch, true_mask, train=3, validation=0)
    train = night.pipeline.train_ssl

    def fails(promoted: Any, report: Any, without: Any = (), part: float = 1.0) -> Path:
        if "case1" in without:
            raise TrainingDivergedError("the loss is not finite")
        return train(promoted, report, without, part)

    monkeypatch.setattr(night.pipeline, "train_ssl", fails)
    state, promoted = night.run()
    assert [one.case for one in state.evidence.scored] == ["case0", "case2"]
    assert len(promoted) == 2
    (warning,) = [w for w in night.pipeline.cases.warnings if "not finite" in w]
    assert warning.startswith("no model without case1")


def scored(case: str, fold: bool = True, agreement: float | None = 0.9, **dice: float | None) -> Scored:
    return Scored(case, fold, {"liver": agreement}, {source: {"liver": value} for source, value in dice.items()})


def test_the_source_is_chosen_on_all_human_labels() -> None:
    found = Evidence((scored("a", ssl=0.6, adapter=0.9), scored("b", fold=False, ssl=0.8, adapter=0.7)), ("liver",))
    assert choose_source(found, ("ssl", "adapter")) == "adapter"
    assert found.compared(("ssl", "adapter")) == pytest.approx({"ssl": 0.7, "adapter": 0.8})
    # equally good, or nothing known: the first
    assert choose_source(Evidence((scored("a", ssl=0.8, adapter=0.8),), ("liver",)), ("ssl", "adapter")) == "ssl"
    assert choose_source(Evidence((), ("liver",)), ("ssl", "adapter")) == "ssl"


def test_each_label_comes_from_the_source_that_is_best_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The liver of the SSL model and the tumour of the adaptation network, cut where it leaves that liver."""
    night = Night(tmp_path, monkeypatch, lambda case: np.minimum(true_mask(case), 1))
    p, predict = night.pipeline, night.pipeline.predict

    def refined(case: Prepared) -> np.ndarray:
        mask = np.where(true_mask(case) == 2, 2, np.minimum(moved(case), 1)).astype(np.uint8)
        mask[32:34, 2:4, 5:7] = 2
        return mask

    def by_kind(kind: ModelKind, models: ModelSet) -> Any:
        found = predict(kind, models)
        if kind == ModelKind.ADAPTER:
            found.drawn = refined
        return found

    monkeypatch.setattr(p, "predict", by_kind)
    models = ModelSet(dict.fromkeys((ModelKind.SSL, ModelKind.SAM, ModelKind.ADAPTER), p.train_ssl([], no_progress)))
    sources, crossed = cascade_sources(p, models), cross_fit(p, no_progress)
    evidence = gather(p, crossed, models, sources)
    chosen = choose_sources(evidence, ("ssl", "adapter"), LABELS.names)
    assert chosen == {"liver": "ssl", "tumour": "adapter"}
    maps, mixed = mix_sources(p, evidence, crossed, models, sources, chosen)
    for case in p.cases.unlabelled:
        np.testing.assert_array_equal(LABELS.decode(maps(case)), true_mask(case))
    # on every human label, by the model that has not seen it; but for the two folds whose masks the adaptation network
    # has learned to correct: its tumours are part of the liver
    assert len(mixed.scored) == 6
    assert mixed.by_label("mixed") == {"liver": [1.0] * 4, "tumour": [1.0] * 4}
    assert no_worse(mixed, "ssl")
    assert no_worse(mixed, "adapter")
    floors = judge_labels(mixed, "mixed", p.settings.floors, LABELS)
    assert not floors.reasons
    # no source alone would do: ssl has no tumour, and the adapter's liver is moved
    for source, label in (("ssl", "tumour"), ("adapter", "liver")):
        assert label in judge_labels(evidence, source, p.settings.floors, LABELS).reasons


@pytest.mark.parametrize(
    ("names", "nested", "chosen", "known"),
    [
        ("liver,tumour", "tumour:liver", ("ssl", "adapter"), set()),
        ("liver,tumour", "tumour:liver", ("consensus", "ensemble"), set()),
        ("liver,tumour", "tumour:liver", ("ssl", "ensemble"), {"liver", "tumour"}),
        ("liver,kidney,tumour", "tumour:liver", ("sam", "ssl", "ssl"), {"kidney"}),
    ],
)
def test_on_learned_folds_a_mix_is_scored_where_nothing_refined_shapes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, nested: str, chosen: tuple[str, ...], known: set[str]
) -> None:
    night = Night(tmp_path, monkeypatch, true_mask)
    p = night.pipeline
    p.labels = Labels.parse(names, nested)
    models = ModelSet(dict.fromkeys((ModelKind.SSL, ModelKind.SAM, ModelKind.ADAPTER), p.train_ssl([], no_progress)))

    def four(case: Prepared) -> np.ndarray:
        return np.where(true_mask(case) == 2, len(p.labels), true_mask(case))

    predict = p.predict

    def predicted(kind: ModelKind, models: ModelSet) -> Any:
        found = predict(kind, models)
        found.drawn, found.labels = four, p.labels
        return found

    monkeypatch.setattr(p, "predict", predicted)
    sources, crossed = cascade_sources(p, models), cross_fit(p, no_progress)
    assert crossed is not None
    sources["ensemble"] = sources["ssl"]
    evidence = gather(p, crossed, models, sources)
    _, mixed = mix_sources(p, evidence, crossed, models, sources, dict(zip(p.labels.names, chosen, strict=True)))
    learned = {c.id for fold in crossed.learned for c in fold.cases}
    assert learned
    for one in mixed.scored:
        assert set(one.dice["mixed"]) == (known if one.case in learned else set(p.labels.names))


def test_a_mix_stays_only_where_it_is_compared_and_no_worse_for_every_label() -> None:
    def one(case: str, **dice: tuple[float, ...]) -> Scored:
        by_label = {source: dict(zip(LABELS.names, values, strict=False)) for source, values in dice.items()}
        return Scored(case, True, dict.fromkeys(LABELS.names), by_label)

    known = one("a", ssl=(0.9, 0.2), adapter=(0.8, 0.5), mixed=(0.9, 0.5))
    assert no_worse(Evidence((known,), LABELS.names), "ssl")
    cut = one("a", ssl=(0.9, 0.6), adapter=(0.95, 0.5), mixed=(0.95, 0.3))
    assert not no_worse(Evidence((cut,), LABELS.names), "ssl")
    # a learned fold, where only the ssl masks are scored: the others are compared on the rest
    learned = one("b", ssl=(0.1, 0.1), mixed=())
    assert no_worse(Evidence((known, learned), LABELS.names), "ssl")
    assert Evidence((known, learned), LABELS.names).compared(["mixed"])["mixed"] == pytest.approx(0.325 + 0.15)
    assert not no_worse(Evidence((learned,), LABELS.names), "ssl")
    # nobody has a tumour
    bare = one("c", ssl=(0.9,), mixed=(0.9,))
    assert no_worse(Evidence((bare,), LABELS.names), "ssl")


def test_masks_that_the_adapter_has_learned_say_nothing_of_it() -> None:
    learned = replace(scored("a", ssl=0.2), learned=True)
    found = Evidence((learned, scored("b", ssl=0.6, adapter=0.9)), ("liver",))
    assert found.by_label("adapter") == {"liver": [0.9]}
    assert found.by_label("ssl") == {"liver": [0.2, 0.6]}
    # one of its members has not seen the label
    assert found.by_label("ensemble") == {"liver": [0.2, 0.6]}
    assert [pair.case for pair in found.pairs("adapter")["liver"]] == ["b"]
    # compared on all labels by how far it is better where it is known
    assert found.compared(("ssl", "adapter")) == pytest.approx({"ssl": 0.4, "adapter": 0.7})


def test_a_label_that_nobody_has_drawn_is_taken_from_the_best_source() -> None:
    found = Evidence((scored("a", ssl=0.6, adapter=0.9),), ("liver", "tumour"))
    assert choose_sources(found, ("ssl", "adapter"), found.names) == {"liver": "adapter", "tumour": "adapter"}


def test_the_ensemble_is_compared_where_no_member_has_seen_the_label() -> None:
    one, two = scored("a", ssl=0.5), scored("b", fold=False, ssl=0.8, ensemble=0.9)
    found = Evidence((one, two), ("liver",))
    assert found.compared(("ssl", "ensemble")) == pytest.approx({"ssl": 0.65, "ensemble": 0.75})
    assert Evidence((one,), ("liver",)).compared(("ssl", "ensemble")) == {"ssl": 0.5, "ensemble": None}
    # for the floor, the member that has not seen the label stands for it
    assert found.by_label("ensemble") == {"liver": [0.5, 0.9]}


def test_pairs_hold_agreement_and_dice_of_the_source() -> None:
    cases = (
        scored("a", ssl=0.6, adapter=0.9),
        scored("missed", agreement=None, ssl=0.0, adapter=0.0),
        scored("nothing", agreement=None, ssl=None, adapter=None),
    )
    found = Evidence(cases, ("liver",))
    assert found.pairs("adapter") == {"liver": [Pair("a", 0.9, 0.9, audited=False)]}
    # what both networks miss counts against the label
    assert found.by_label("adapter") == {"liver": [0.9, 0.0]}


def test_each_label_has_its_floor() -> None:
    labels = Labels.parse("liver,tumour,kidney,vessel", "tumour:liver,vessel:tumour")
    dice = {"liver": 0.82, "tumour": 0.66, "kidney": 0.4, "vessel": 0.9}
    found = Evidence((Scored("a", True, dict.fromkeys(dice, 1.0), {"ssl": dice}),), labels.names)
    floors = {"liver": 0.8, "tumour": 0.65, "kidney": 0.8, "vessel": 0.65}
    held = judge_labels(found, "ssl", floors, labels)
    why = "kidney: Dice 0.40 on 1 human label that was not trained on, floor 0.8 (promote_floor)"
    assert held.reasons == {"kidney": why}
    assert held.blocking == (held.reasons["kidney"],)
    assert judge_labels(found, "ssl", floors | {"kidney": 0}, labels).reasons == {}
    held = judge_labels(found, "ssl", floors | {"kidney": 0, "tumour": 0.7}, labels)
    assert held.unknown == ("tumour", "vessel")
    assert held.reasons["vessel"] == "vessel: tumour, in which it lies, is not promoted"
    assert held.blocking == ()
    assert held == type(held).stored(held.about, labels)


def test_a_first_model_says_how_good_it_is() -> None:
    words, warning = first_model("ssl", {"liver": [0.9, 0.8], "tumour": [0.1, 0.2, 0.3], "cyst": []})
    assert words.endswith("not trained on: liver 0.85 on 2, tumour 0.20 on 3, cyst on none")
    assert warning.startswith(
        "the first ssl model is published, but tumour has Dice 0.20 and nothing shows how good cyst is"
    )
    assert first_model("ssl", {"liver": [0.9]})[1] == ""


@pytest.mark.parametrize(("parts", "share"), [(0, 0), (2, 1), (3, 2 / 3), (4, 0.5), (8, 0.5)])
def test_folds_share_twice_the_steps_of_one_training(parts: int, share: float) -> None:
    assert fold_share(parts) == pytest.approx(share)


def test_around_a_label_that_is_left_open_the_networks_are_compared_with_it_merged() -> None:
    """As the candidates are: where the networks disagree on the tumour alone, they agree on the liver."""
    both = {"liver": 0.9, "tumour": 0.5}
    one = Scored("a", True, {"liver": 0.6, "tumour": 0.1}, {"ssl": both}, {"liver": 0.95, "tumour": 0.1})
    labels = Labels.parse("liver,tumour", "tumour:liver")
    for unknown, expected in (((), 0.6), (("tumour",), 0.95)):
        pipeline: Any = SimpleNamespace(labels=labels)
        maps: Any = None
        state = RoundState(
            pipeline, maps, maps, maps, "ssl", maps, Evidence((one,), labels.names), Floors(unknown=unknown)
        )
        assert [p.agreement for p in state.pairs["liver"]] == [expected]
