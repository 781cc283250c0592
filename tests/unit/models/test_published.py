"""The manifest decides what is served; the gate decides what gets there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aslseg.models import published
from aslseg.models.gate_rules import Cause
from aslseg.models.kinds import ModelKind
from aslseg.models.published import Candidate, find_published, gate, manifest, put_manifest, stage_files
from aslseg.settings import Paths, Settings


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "studies").mkdir()
    return Paths(Settings(model_dir=str(tmp_path / "models")), tmp_path / "studies")


def candidate(tmp_path: Path, content: str, dice: float | None = 0.8, before: float | None = None) -> Candidate:
    path = tmp_path / f"{content}.safetensors"
    path.write_text(content)
    return Candidate(ModelKind.SSL, path, dice, before, 3, ("a", "b"), {"a": "1"}, "settings")


def put(paths: Paths, *chosen: Candidate, number: int = 1) -> None:
    put_manifest(paths, stage_files(paths, list(chosen), number))


def test_nothing_is_served_before_the_manifest_says_so(paths: Paths, tmp_path: Path) -> None:
    assert find_published(paths, "ssl") is None
    models = stage_files(paths, [candidate(tmp_path, "one")], 4)
    assert find_published(paths, "ssl") is None
    put_manifest(paths, models)
    found = find_published(paths, "ssl", check=True)
    assert found is not None
    assert (found.validation_dice, found.validation_cases, found.round, found.trained_on) == (0.8, 3, 4, ("a", "b"))
    assert (found.labels, found.labelled, found.settings) == ({"a": "1"}, ("a",), "settings")
    assert found.path.name == f"ssl-{found.sha256[:12]}.safetensors"


def test_a_kill_before_the_manifest_leaves_the_old_model(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(paths, candidate(tmp_path, "one"))
    before = find_published(paths, "ssl")
    models = stage_files(paths, [candidate(tmp_path, "two")], 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        put_manifest(paths, models)
    assert find_published(paths, "ssl", check=True) == before


def test_missing_and_damaged_files_are_not_served(paths: Paths, tmp_path: Path) -> None:
    put(paths, candidate(tmp_path, "one"))
    found = find_published(paths, "ssl")
    assert found is not None
    found.path.write_text("0ne")
    assert find_published(paths, "ssl") is not None
    assert find_published(paths, "ssl", check=True) is None
    found.path.unlink()
    assert find_published(paths, "ssl") is None
    (paths.models / "manifest.json").write_text("{")
    assert manifest(paths) == {}


def test_gate_where_settings_changed(paths: Paths, tmp_path: Path) -> None:
    first = candidate(tmp_path, "one", dice=None)
    assert gate(first, None, 0)[0]
    put(paths, first)
    current = find_published(paths, "ssl")
    assert gate(first, current, 0) == (True, "ssl: unchanged")

    def verdict(dice: float | None, before: float | None, tolerance: float) -> tuple[bool, str]:
        return gate(candidate(tmp_path, "two", dice, before), current, tolerance)

    assert verdict(0.8, 0.8, 0)[0]
    assert not verdict(0.79, 0.8, 0)[0]
    assert verdict(0.79, 0.8, 0.02)[0]
    assert verdict(float("nan"), 0.8, 0)[0] is False
    accepted, why = verdict(None, None, 1)
    assert not accepted
    assert "without validation cases" in why


@pytest.mark.parametrize(
    ("cause", "differences", "accepted", "words"),
    [
        (Cause.MASKS, [0.1, 0.1], False, "no human label is new, and 2 to compare on is too few"),
        (Cause.MASKS, [0.02, 0.0, 0.0], False, "not shown to be better (mean difference of Dice +0.0067 on 3 human"),
        (
            Cause.MASKS,
            [0.03, 0.0, 0.0],
            False,
            "may be worse than the first one with these labels (mean difference of Dice +0.0100 on 3 human labels; "
            "0.0646 is asked of candidate 1)",
        ),
        (
            Cause.MASKS,
            [0.01, 0.011, 0.009],
            True,
            "this model is better (mean difference of Dice +0.0100 on 3 human",
        ),
        (Cause.MASKS, [], False, "only when there are more human labels"),
        (Cause.LABELS, [-0.01], True, "human labels are new, and this model is not shown to be worse"),
        (
            Cause.LABELS,
            [-0.09],
            False,
            "this model is shown to be worse (mean difference of Dice -0.0900 on 1 human label)",
        ),
        (
            Cause.LABELS,
            [-0.04, -0.05, -0.06, -0.07],
            False,
            "is shown to be worse (mean difference of Dice -0.0550 on 4",
        ),
        (Cause.SETTINGS, [0.3, 0.3, 0.3], False, "Dice 0.7900, published 0.8000 on 3 validation cases"),
    ],
)
def test_what_has_changed_decides_what_is_asked(
    paths: Paths, tmp_path: Path, cause: Cause, differences: list[float], accepted: bool, words: str
) -> None:
    put(paths, candidate(tmp_path, "one"))
    current, found = find_published(paths, ModelKind.SSL), dict(enumerate(differences))
    changed = replace(candidate(tmp_path, "two", 0.79, 0.8), cause=cause, differences=found)
    decided, why = gate(changed, current, 0)
    assert decided == accepted
    assert words in why
    assert gate(changed, current, 0) == (decided, why)


@pytest.mark.parametrize(("noted", "known"), [(True, ("a",)), (False, ("a", "b"))])
def test_without_a_judge_only_more_human_labels_are_published(
    paths: Paths, tmp_path: Path, noted: bool, known: tuple[str, ...]
) -> None:
    put(paths, candidate(tmp_path, "one"))
    if not noted:  # by a version that noted only what the model was trained on, promoted scans included
        models = manifest(paths)
        del models["ssl"]["labels"]
        put_manifest(paths, models)
    current = find_published(paths, "ssl")
    unjudged = replace(candidate(tmp_path, "two", None), labels=dict.fromkeys(known, "1"))
    accepted, why = gate(unjudged, current, 0)
    assert (accepted, "only when there are more human labels" in why) == (False, True)
    # another, but fewer: the disk with most scans is away for a night
    learned = replace(current, labelled=("a", "b", "d"))
    accepted, why = gate(replace(unjudged, labels={"c": "1"}), learned, 0)
    assert (accepted, "only when there are more human labels" in why) == (False, True)
    accepted, why = gate(replace(unjudged, labels=dict.fromkeys((*known, "c"), "1")), current, 0)
    assert (accepted, "published unchecked" in why, "1 new human label and no fewer." in why) == (True, True, True)


def test_old_files_are_kept_three_deep(paths: Paths, tmp_path: Path) -> None:
    import os

    for n, name in enumerate(["one", "two", "three", "four", "five"]):
        put(paths, candidate(tmp_path, name), number=n)
        found = find_published(paths, "ssl")
        assert found is not None
        os.utime(found.path, (n, n))
        if n == 0:
            first = manifest(paths)
    put_manifest(paths, first)
    published.prune(paths, 3)
    left = sorted(p.stat().st_mtime for p in paths.models.glob("ssl-*"))
    assert left == [0, 2, 3, 4]


def test_what_is_better_than_the_published_model_may_still_be_worse_than_the_first(
    paths: Paths, tmp_path: Path
) -> None:
    put(paths, candidate(tmp_path, "one"))
    current = find_published(paths, ModelKind.SSL)
    better = dict(enumerate([0.02, 0.021, 0.022, 0.021]))
    found = replace(candidate(tmp_path, "two", 0.79, 0.8), cause=Cause.MASKS, differences=better)
    assert gate(found, current, 0)[0]
    below = {case: d - 0.03 for case, d in better.items()}
    accepted, why = gate(replace(found, first=below), current, 0)
    assert not accepted
    assert "may be worse than the first one with these labels (mean difference of Dice -0.0090 on 4 human labels" in why
    scattered = dict(enumerate([0.0, 0.04, 0.02, 0.03]))
    assert gate(replace(found, first={c: d + 0.02 for c, d in scattered.items()}), current, 0)[0]
    assert not gate(replace(found, first=scattered, tries=10), current, 0)[0], "the luckiest of ten is no proof"
