"""Audits: drawn once at random, answered by the label that a person saves, and what a round makes of the answers."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aslseg.cases.studies import PSEUDO
from aslseg.files import sha256
from aslseg.rounds.feedback.corrections import record_checked
from aslseg.rounds.folds.evidence import Floors
from aslseg.rounds.label_files.masks import MaskStore
from aslseg.rounds.ledger.audits import (
    AUDIT,
    CHECKED,
    GONE,
    audited_pairs,
    audits,
    kept_since,
    promise_lines,
    promises_by_round,
    waiting,
)
from aslseg.rounds.ledger.ledger import Entry, Ledger
from aslseg.rounds.promotion import canaries, promotion
from aslseg.rounds.promotion.audit_draw import draw_audits
from aslseg.rounds.run import run_round
from aslseg.settings import Paths, Settings
from aslseg.volume.io import read_image, write_label
from tiny_rounds import Judged, published_hashes, tiny_settings, tiny_studies

UNLABELLED = [f"phantom_{n:03d}" for n in range(1, 9)]


@pytest.fixture
def pool(tmp_path: Path) -> SimpleNamespace:
    """What draws need of a round: a studies folder, a ledger, scans without a label."""
    settings = tiny_settings(tmp_path, audits=3)
    paths = Paths(settings, tiny_studies(tmp_path, cases=9, labelled=1))
    assert paths.studies is not None
    scans = [SimpleNamespace(id=c, image_hash=sha256(paths.studies / f"{c}.nii.gz")) for c in UNLABELLED]
    ledger = Ledger(paths.ledger)
    ledger.append([Entry("opened", 1)])
    return SimpleNamespace(
        paths=paths, settings=settings, ledger=ledger, cases=SimpleNamespace(unlabelled=scans), number=1
    )


def promote(pool: Any, *cases: str, number: int = 1) -> None:
    """Promote the true masks of scans."""
    images = {c.id: c.image_hash for c in pool.cases.unlabelled}
    about = {c: details(pool, c) | {"image": images[c], "threshold": {}, "models": {}} for c in cases}
    pool.ledger.append([Entry("mask", number, c, PSEUDO, about[c]) for c in cases])


def details(pool: Any, case: str) -> dict[str, Any]:
    truth = read_image(pool.paths.studies.parent / "studies_truth" / f"{case}.nii.gz")
    digest = MaskStore(pool.paths.home).add(truth.array.astype(np.uint8), truth.affine)
    scan = pool.paths.studies / f"{case}.nii.gz"
    return {"sha256": digest, "image": sha256(scan), "agreement": {"liver": 0.9, "tumour": None}}


def draw(pool: Any, spare: tuple[str, ...] = ()) -> list[str]:
    return draw_audits(pool, spare, lambda case: details(pool, case))


def answer(pool: Any, case: str, label: np.ndarray | None = None) -> None:
    """Save a label as a person does: the true one, or another."""
    truth = read_image(pool.paths.studies.parent / "studies_truth" / f"{case}.nii.gz")
    array = truth.array.astype(np.uint8) if label is None else label
    write_label(pool.paths.studies / "labels" / "final" / f"{case}.nii.gz", array, truth.affine)
    record_checked(pool.paths, pool.settings, case)


def test_a_saved_label_reads_the_promoted_mask_of_its_own_scan(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After thirty rounds there are fifteen thousand others, for which everybody waited half a second."""
    promote(pool, *UNLABELLED)
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr("aslseg.rounds.ledger.rows.json.loads", lambda text: parsed.append(text) or loads(text))
    answer(pool, UNLABELLED[0])
    assert [e.case for e in pool.ledger.events(kinds=(CHECKED,))] == [UNLABELLED[0]]
    assert sum('"threshold"' in text for text in parsed) == 1


def test_some_of_the_promoted_scans_are_drawn_at_random_and_once(pool: Any) -> None:
    promote(pool, *UNLABELLED[:6])
    first = draw(pool)
    assert len(first) == 3
    assert set(first) < set(UNLABELLED[:6])
    assert draw(pool) == [], "a round that was killed after the draw, and goes on"
    assert [(a.case, a.round, a.promoted, a.dice) for a in waiting(pool.ledger)] == [(c, 1, True, None) for c in first]
    pool.number = 2
    second = draw(pool)
    assert sorted([*first, *second]) == UNLABELLED[:6], "not those that wait"
    pool.number = 3
    assert draw(pool) == []
    assert len(pool.ledger.events(kinds=(AUDIT,))) == 6


def test_the_draw_depends_on_the_seed_and_the_round_alone(pool: Any, tmp_path: Path) -> None:
    def drawn(seed: int, number: int) -> list[str]:
        other = SimpleNamespace(**vars(pool) | {"ledger": Ledger(tmp_path / f"{seed} {number} {len(again)}.sqlite")})
        other.settings, other.number = pool.settings.model_copy(update={"seed": seed}), number
        promote(other, *UNLABELLED)
        return draw(other)

    again: list[list[str]] = []
    for _ in range(2):
        again.append(drawn(1, 1))
    assert again[0] == again[1]
    others = [drawn(seed, number) for seed in range(5) for number in range(1, 5)]
    assert {c for found in others for c in found} == set(UNLABELLED), "every scan can be drawn"


def test_scans_that_came_close_are_drawn_where_too_few_are_promoted(pool: Any) -> None:
    promote(pool, UNLABELLED[0])
    assert draw(pool, ("phantom_000", *UNLABELLED[:4]))[0] == UNLABELLED[0]
    assert [a.promoted for a in audits(pool.ledger)] == [True, False, False]
    assert {a.case for a in audits(pool.ledger)[1:]} < set(UNLABELLED[1:4]), "phantom_000 has a human label"


def test_nothing_is_drawn_without_the_setting_or_outside_a_round(pool: Any) -> None:
    promote(pool, *UNLABELLED)
    pool.settings = pool.settings.model_copy(update={"audits": 0})
    assert draw(pool) == []
    pool.settings, pool.number = pool.settings.model_copy(update={"audits": 3}), None
    assert draw(pool) == []
    assert pool.ledger.events(kinds=(AUDIT,)) == []


def test_the_label_that_a_person_saves_answers_an_audit_and_nothing_else_is_one(pool: Any) -> None:
    promote(pool, *UNLABELLED[:4])
    pool.settings = pool.settings.model_copy(update={"audits": 1})
    (drawn,) = draw(pool)
    chosen = next(c for c in UNLABELLED[:4] if c != drawn)
    answer(pool, chosen)
    assert [e.case for e in pool.ledger.events(kinds=(CHECKED,))] == [chosen], "recorded, but no audit"
    assert audited_pairs(pool.ledger, ("liver",)) == {"liver": []}
    answer(pool, drawn)
    pairs = audited_pairs(pool.ledger, ("liver", "tumour"))
    assert [(p.case, p.agreement, p.dice, p.audited) for p in pairs["liver"]] == [(drawn, 0.9, 1.0, True)]
    assert pairs["tumour"] == [], "both networks found none, so nobody can say how well they agree on it"
    assert waiting(pool.ledger) == []
    record_checked(pool.paths, pool.settings)
    assert len(pool.ledger.events(kinds=(CHECKED,))) == 2, "each pair of mask and label once"
    shape = read_image(pool.paths.studies / f"{drawn}.nii.gz").array.shape
    answer(pool, drawn, np.zeros(shape, np.uint8))
    assert [p.dice for p in audited_pairs(pool.ledger, ("liver",))["liver"]] == [0.0], "the corrected label counts"


def test_an_audited_mask_is_compared_although_it_is_not_promoted_any_more(pool: Any) -> None:
    promote(pool, UNLABELLED[0])
    assert draw(pool) == [UNLABELLED[0]]
    kept = MaskStore(pool.paths.home)
    pool.ledger.append([Entry("removed", 2, UNLABELLED[0], PSEUDO, {"why": "not promoted in this round", "was": "x"})])
    pool.ledger.close_round(1, {})
    for number in range(2, 9):
        pool.ledger.append([Entry("opened", number)])
        pool.ledger.close_round(number, {})
    kept.prune(pool.ledger)
    assert kept.path(audits(pool.ledger)[0].mask).exists(), "masks of audits that wait are kept"
    answer(pool, UNLABELLED[0])
    assert [p.dice for p in audited_pairs(pool.ledger, ("liver",))["liver"]] == [1.0]
    kept.prune(pool.ledger)
    assert not kept.path(audits(pool.ledger)[0].mask).exists()


def test_a_replaced_scan_answers_nothing_and_can_be_drawn_again(pool: Any) -> None:
    promote(pool, UNLABELLED[0])
    draw(pool)
    scan = pool.paths.studies / f"{UNLABELLED[0]}.nii.gz"
    image = read_image(scan)
    write_label(scan, image.array[::-1].astype(np.uint8), image.affine)
    for _ in range(2):
        answer(pool, UNLABELLED[0])
    assert [e.details["why"] for e in pool.ledger.events(kinds=("note",))] == [GONE], "said once"
    assert audited_pairs(pool.ledger, ("liver",)) == {"liver": []}
    assert waiting(pool.ledger) == []
    (pool.paths.studies / "labels" / "final" / f"{UNLABELLED[0]}.nii.gz").unlink()
    pool.cases.unlabelled[0].image_hash = sha256(scan)
    pool.number = 2
    promote(pool, UNLABELLED[0], number=2)
    assert draw(pool) == [UNLABELLED[0]]


def test_an_audit_of_a_scan_that_was_deleted_or_replaced_is_over_with_the_next_round(pool: Any) -> None:
    promote(pool, *UNLABELLED[:3])
    deleted, replaced, kept = draw(pool)
    pool.cases.unlabelled = [c for c in pool.cases.unlabelled if c.id != deleted]
    next(c for c in pool.cases.unlabelled if c.id == replaced).image_hash = "another"
    pool.number = 2
    assert draw(pool) == []
    assert [a.case for a in waiting(pool.ledger)] == [kept]
    assert [e.case for e in pool.ledger.events(kinds=("note",))] == sorted([deleted, replaced])
    assert draw(pool) == []
    assert len(pool.ledger.events(kinds=("note",))) == 2


def test_audits_of_a_round_that_was_rolled_back_are_over(pool: Any) -> None:
    promote(pool, *UNLABELLED[:3])
    draw(pool)
    pool.ledger.append([Entry("closed", 1), Entry("rolled back", 1)])
    assert waiting(pool.ledger) == []
    pool.number = 2
    promote(pool, *UNLABELLED[:3], number=2)
    assert len(draw(pool)) == 3


def test_a_promise_is_held_against_the_audits_that_came_after_it(pool: Any) -> None:
    about = {"target": 0.8, "confidence": 0.9, "bound": 0.81, "k": 3, "audits": 6, "pairs": 12, "r": 0.9, "missing": 0}
    promote(pool, *UNLABELLED[:3])
    draw(pool)
    summary = {"promise": {"liver": about | {"made": True}}}
    pool.ledger.close_round(1, summary)
    assert kept_since(pool.ledger, pool.ledger.rounds()) == {}
    shape = read_image(pool.paths.studies / f"{UNLABELLED[0]}.nii.gz").array.shape
    answer(pool, UNLABELLED[0], np.zeros(shape, np.uint8))
    answer(pool, UNLABELLED[1])
    rounds = pool.ledger.rounds()
    assert kept_since(pool.ledger, rounds) == {"liver": (2, 0.5)}
    (line,) = promises_by_round(pool.ledger, rounds)[1]
    assert line.endswith("from 6 audits; 2 audits since: mean Dice 0.500, NOT kept")


def evidence(ledger: Ledger, dice: float) -> None:
    """Twelve answered audits of other scans, whose masks had this Dice, give or take a little."""
    for n, agreement in enumerate(np.linspace(0.7, 0.97, 12)):
        about = {"sha256": f"m{n}", "image": "i", "agreement": {"liver": agreement}, "promoted": True}
        answered = {"mask": f"m{n}", "label": "l", "dice": {"liver": dice + 0.02 * agreement}}
        ledger.append([Entry(AUDIT, None, f"x{n}", PSEUDO, about), Entry(CHECKED, None, f"x{n}", PSEUDO, answered)])


def assessed(monkeypatch: pytest.MonkeyPatch, agreement: float) -> None:
    """Let the networks agree to a certain degree on every scan."""
    from aslseg.agreement.measures import Agreement
    from aslseg.agreement.promotion_rules import Verdict

    found = Agreement({"liver": agreement, "tumour": None}, agreement)
    monkeypatch.setattr(promotion, "compare", lambda *_: found)
    reasons = () if agreement >= 0.9 else (f"liver: agreement {agreement:.3f} below 0.9",)
    monkeypatch.setattr(promotion, "judge", lambda *_: Verdict(not reasons, reasons))
    monkeypatch.setattr(canaries, "FLOOR", 0.0)  # networks of six steps are wrong on the validation scan


def tiny(root: Path, **conf: object) -> tuple[Path, Settings, Ledger]:
    studies = tiny_studies(root, cases=5)
    base = {"promote_fraction": 1, "promote_empty": 1, "promote_threshold": "0.9", "audits": 1}
    # no validation case: its pair of agreement and Dice, of networks of six steps, would be evidence too
    base |= {"validation_fraction": 0}
    settings = tiny_settings(root, **base | conf)
    return studies, settings, Ledger(Paths(settings, studies).ledger)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("dice", "agreement", "promoted"), [(0.95, 0.8, 2), (0.6, 0.95, 0)])
def test_audits_decide_in_place_of_the_fixed_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice: float, agreement: float, promoted: int
) -> None:
    studies, settings, ledger = tiny(tmp_path)
    evidence(ledger, dice)
    assessed(monkeypatch, agreement)
    summary = run_round(studies, settings)
    assert len(summary["promoted"]) == promoted
    about = summary["promise"]["liver"]
    assert (about["made"], about["k"], about["audits"], about["missing"]) == (promoted > 0, promoted, 12, 0)
    assert (about["bound"] >= 0.85) == (promoted > 0)
    assert summary["promise"]["tumour"]["missing"] == 9
    for case, decided in summary["decisions"].items():
        refusal = "passed, but the promise (mean Dice liver 0.85) holds for no scan (promote_target)"
        assert decided["reasons"] == ([] if case in summary["promoted"] else [refusal])
    (drawn,) = waiting(ledger)
    assert (drawn.round, drawn.promoted) == (1, promoted > 0), "audits go on, so that a promise can come back"
    scores = {s.case: s.details["promote"] for s in ledger.scores()}
    assert all(scores.values()), "the fixed agreement is no reason any more"


@pytest.mark.usefixtures("quick")
def test_without_audits_the_fixed_agreement_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies, settings, ledger = tiny(tmp_path)
    assessed(monkeypatch, 0.8)
    summary = run_round(studies, settings)
    assert summary["promoted"] == []
    assert {name: about["missing"] for name, about in summary["promise"].items()} == {"liver": 9, "tumour": 9}
    assert len(waiting(ledger)) == 1


@pytest.mark.usefixtures("quick")
def test_a_round_that_is_killed_after_its_draw_draws_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, settings, ledger = tiny(tmp_path)
    assessed(monkeypatch, 0.95)
    with monkeypatch.context() as killed:
        killed.setattr(promotion, "write_originals", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_round(studies, settings)
    before = ledger.events(kinds=(AUDIT,))
    assert len(before) == 1
    assert run_round(studies, settings)["continued"]
    assert ledger.events(kinds=(AUDIT,)) == before


@pytest.mark.usefixtures("plausible")
def test_a_rejected_round_promises_nothing_and_loses_no_audit(tmp_path: Path, judged: Judged) -> None:
    """The label is new, but a validation case shows that the model that learned it is worse."""
    studies, settings, ledger = tiny(tmp_path, audits=2)
    (studies / "patients.csv").write_text("case,patient,role\nphantom_000,a,train\nphantom_001,b,validation\n")
    good: set[str] = set()
    judged(lambda digest: 0.9 if not good or digest in good else 0.1)
    run_round(studies, settings)
    good.add(published_hashes(settings, studies)["ssl"])
    first, second = waiting(ledger)
    shutil.copy(tmp_path / "studies_truth" / f"{second.case}.nii.gz", studies / "labels" / "final")
    summary = run_round(studies, settings)
    assert first.case in summary["withdrawn"]
    assert summary["promise"]["liver"]["withdrawn"]
    assert promise_lines(summary["promise"])[0].startswith("liver: no promise: the promotions of this round were")
    assert waiting(ledger) == [first], "its mask stands again and waits still; the other one is answered"
    assert [p.case for p in audited_pairs(ledger, ("liver",))["liver"]] in ([second.case], []), "empty in both: none"
    assert ledger.events(kinds=(CHECKED,))[0].case == second.case


def test_a_canary_keeps_the_fixed_agreement_where_the_promise_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation scan on which the networks disagree would not be promoted, and stops nothing."""
    assessed(monkeypatch, 0.1)
    settings = tiny_settings(tmp_path, promote_threshold="0.9")
    mask = np.ones((4, 4, 4), np.uint8)
    p = SimpleNamespace(
        settings=settings,
        labels=settings.label_set,
        decode=lambda maps: maps,
        reference=None,
        cases=SimpleNamespace(unlike={}),
    )
    state: Any = SimpleNamespace(
        pipeline=p,
        floors=Floors(),
        promises=SimpleNamespace(lines={"liver": None}),
        **dict.fromkeys(("ssl_maps", "second_maps", "masks"), lambda _: mask),
    )
    case: Any = SimpleNamespace(id="a", image=mask, grid=SimpleNamespace(spacing=(1, 1, 1)))
    assert promotion._assess_one(state, case)[0].verdict.promote, "the promise decides for other scans"
    p.cases.validation, p.cases.warnings, case.label = [case], [], np.zeros_like(mask)
    monkeypatch.setattr(canaries, "FLOOR", 0.5)
    (found,), stops = canaries.watch(state.pipeline, partial(promotion._assess_one, state))
    assert (found.verdict.promote, stops) == (False, [])


def test_audits_that_wait_are_found_without_the_summaries(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(pool, *UNLABELLED[:3])
    drawn = draw(pool)
    monkeypatch.setattr(Ledger, "rounds", lambda _: pytest.fail("reads the summaries of all rounds"))
    assert [a.case for a in waiting(pool.ledger)] == drawn
