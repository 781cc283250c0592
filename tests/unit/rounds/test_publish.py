"""The manifest decides what is served; the gate decides what gets there."""

from __future__ import annotations

from pathlib import Path

import pytest

from aslseg.rounds import publish
from aslseg.rounds.publish import Candidate, gate, manifest, published, put_manifest, stage_files
from aslseg.settings import Places, Settings


@pytest.fixture
def places(tmp_path: Path) -> Places:
    (tmp_path / "studies").mkdir()
    return Places(Settings(model_dir=str(tmp_path / "models")), tmp_path / "studies")


def candidate(tmp_path: Path, content: str, dice: float | None = 0.8, before: float | None = None) -> Candidate:
    path = tmp_path / f"{content}.safetensors"
    path.write_text(content)
    return Candidate("ssl", path, dice, before, 3, ("a", "b"))


def put(places: Places, *chosen: Candidate, number: int = 1) -> None:
    put_manifest(places, stage_files(places, list(chosen), number))


def test_nothing_is_served_before_the_manifest_says_so(places: Places, tmp_path: Path) -> None:
    assert published(places, "ssl") is None
    models = stage_files(places, [candidate(tmp_path, "one")], 4)
    assert published(places, "ssl") is None
    put_manifest(places, models)
    found = published(places, "ssl", check=True)
    assert found is not None
    assert (found.validation_dice, found.validation_cases, found.round, found.trained_on) == (0.8, 3, 4, ("a", "b"))
    assert found.path.name == f"ssl-{found.sha256[:12]}.safetensors"


def test_a_kill_before_the_manifest_leaves_the_old_model(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(places, candidate(tmp_path, "one"))
    before = published(places, "ssl")
    models = stage_files(places, [candidate(tmp_path, "two")], 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        put_manifest(places, models)
    assert published(places, "ssl", check=True) == before


def test_missing_and_damaged_files_are_not_served(places: Places, tmp_path: Path) -> None:
    put(places, candidate(tmp_path, "one"))
    found = published(places, "ssl")
    assert found is not None
    found.path.write_text("0ne")
    assert published(places, "ssl") is not None
    assert published(places, "ssl", check=True) is None
    found.path.unlink()
    assert published(places, "ssl") is None
    (places.models / "manifest.json").write_text("{")
    assert manifest(places) == {}


def test_gate(places: Places, tmp_path: Path) -> None:
    first = candidate(tmp_path, "one", dice=None)
    assert gate(first, None, 0)[0]
    put(places, first)
    current = published(places, "ssl")
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


def test_old_files_are_kept_three_deep(places: Places, tmp_path: Path) -> None:
    import os

    for n, name in enumerate(["one", "two", "three", "four", "five"]):
        put(places, candidate(tmp_path, name), number=n)
        found = published(places, "ssl")
        assert found is not None
        os.utime(found.path, (n, n))
        if n == 0:
            first = manifest(places)
    put_manifest(places, first)
    publish.prune(places)
    left = sorted(p.stat().st_mtime for p in places.models.glob("ssl-*"))
    assert left == [0, 2, 3, 4]
