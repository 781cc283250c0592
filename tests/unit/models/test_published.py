"""The manifest decides what is served; the gate decides what gets there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aslseg.models import published
from aslseg.models.published import Candidate, find_published, gate, manifest, put_manifest, stage_files
from aslseg.settings import Paths, Settings


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "studies").mkdir()
    return Paths(Settings(model_dir=str(tmp_path / "models")), tmp_path / "studies")


def candidate(tmp_path: Path, content: str, dice: float | None = 0.8, before: float | None = None) -> Candidate:
    path = tmp_path / f"{content}.safetensors"
    path.write_text(content)
    return Candidate("ssl", path, dice, before, 3, ("a", "b"))


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


def test_gate(paths: Paths, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("noted", "known"), [(True, ("a",)), (False, ("a", "b"))])
def test_without_a_judge_only_more_human_labels_are_published(
    paths: Paths, tmp_path: Path, noted: bool, known: tuple[str, ...]
) -> None:
    put(paths, replace(candidate(tmp_path, "one"), labelled=("a",)))
    if not noted:  # by a version that noted only what the model was trained on, promoted scans included
        models = manifest(paths)
        del models["ssl"]["labelled"]
        put_manifest(paths, models)
    current = find_published(paths, "ssl")
    unjudged = replace(candidate(tmp_path, "two", None), labelled=known)
    accepted, why = gate(unjudged, current, 0)
    assert (accepted, "only when there are more human labels" in why) == (False, True)
    accepted, why = gate(replace(unjudged, labelled=(*known, "c")), current, 0)
    assert (accepted, "published unchecked" in why, "1 more human label." in why) == (True, True, True)


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
