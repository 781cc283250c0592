"""Artefacts are found again by their inputs, and only by these."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from aslseg.cases.prepared_case import Prepared
from aslseg.models.cascade import StageOutput
from aslseg.rounds.steps.artefacts import ArtefactStore, CachedProbabilities, joined, nest
from aslseg.rounds.steps.pipeline import RoundPipeline
from aslseg.types import Labels, Volume
from aslseg.volume.geometry import Grid


def case(name: str = "a", content: str = "0") -> Prepared:
    image = np.zeros((3, 4, 5), np.float32)
    return Prepared(name, name, image, Grid.of(Volume(image, np.eye(4)), None), image_hash=content * 64)


def test_a_model_is_trained_once_for_the_same_inputs(tmp_path: Path) -> None:
    trained = []

    def train(out: Path) -> dict[str, Any]:
        trained.append(out)
        out.write_text("weights")
        return {"loss": 1}

    steps = ArtefactStore(tmp_path)
    first = steps.model("ssl", {"seed": 1}, train)
    assert ArtefactStore(tmp_path).model("ssl", {"seed": 1}, train) == first
    assert steps.model("ssl", {"seed": 2}, train) != first
    assert len(trained) == 2
    steps.prune([first.parent.name])
    assert [p.name for p in tmp_path.iterdir()] == [first.parent.name]


def test_maps_are_computed_once_and_keep_the_mask_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    regions = rng.random((2, 3, 4, 5), np.float32)
    regions.flat[:4] = [0.5, 0.4999, 0.49999, 0.50001]
    made = []

    def make(c: Prepared) -> StageOutput:
        made.append(c.id)
        return StageOutput(regions)

    maps = CachedProbabilities(tmp_path, make)
    assert not maps.has(case())
    first, second = maps(case()), maps(case())
    assert made == ["a"]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first >= 0.5, regions >= 0.5)
    assert np.abs(first - regions).max() <= 0.5 / 255 + 1e-6


def cut(content: bytes) -> bytes:
    return content[:40]


def zeros(content: bytes) -> bytes:
    """With a block of zeros in the compressed array."""
    return content[:60] + bytes(20) + content[80:]


def flipped(content: bytes) -> bytes:
    """With one bit of the compressed array the other way."""
    return content[:62] + bytes([content[62] ^ 64]) + content[63:]


def test_the_ensemble_and_the_consensus_are_means(tmp_path: Path) -> None:
    def constant(name: str, value: float) -> CachedProbabilities:
        return CachedProbabilities(tmp_path / name, lambda c: StageOutput(np.full((1, *c.image.shape), value)))

    members = [constant(name, value) for name, value in (("a", 0.2), ("b", 0.4), ("c", 0.9))]
    pipeline: Any = SimpleNamespace(artefacts=ArtefactStore(tmp_path))
    np.testing.assert_allclose(RoundPipeline.ensemble(pipeline, members)(case()), 0.5, atol=0.003)
    np.testing.assert_allclose(RoundPipeline.consensus(pipeline, *members[1:])(case()), 0.65, atol=0.003)


def test_another_scan_under_the_same_name_and_a_damaged_file_are_computed_again(tmp_path: Path) -> None:
    made = []

    def make(c: Prepared) -> StageOutput:
        made.append(c.id)
        return StageOutput(np.zeros((1, 3, 4, 5), np.float32))

    maps = CachedProbabilities(tmp_path, make)
    maps(case(content="1"))
    maps(case(content="2"))
    for times, damage in enumerate((cut, zeros, flipped), 3):
        (path,) = tmp_path.glob("a-2*.npz")
        path.write_bytes(damage(path.read_bytes()))
        maps(case(content="2"))
        assert len(made) == times


def test_notes_are_kept_and_said_each_time_a_map_is_used(tmp_path: Path) -> None:
    regions = np.full((1, 3, 4, 5), 0.2, np.float32)
    said: list[tuple[str, str]] = []

    def maps(name: str, *notes: str) -> CachedProbabilities:
        return CachedProbabilities(tmp_path / name, lambda _: StageOutput(regions, notes), lambda *n: said.append(n))

    first, second = maps("first", "liver was not found"), maps("second")
    mean = joined(tmp_path / "mean", [first, second], lambda found: np.mean(found, 0))
    for _ in range(2):
        assert mean.output(case()).notes == ("liver was not found",)
        assert second.output(case()).notes == ()
    again = maps("first")  # a round that goes on, or the next one, finds what an earlier one computed
    assert again.output(case()).notes == ("liver was not found",)
    mostly = joined(tmp_path / "mostly", [first, second, second], lambda found: np.mean(found, 0), most=True)
    assert mostly.output(case()).notes == (), "one of three says nothing of their mean"
    said.pop()
    assert said == [("a", "liver was not found")] * 2, "once for the mean, once for the next round"

    path = next((tmp_path / "second").glob("*.npz"))
    with path.open("wb") as file:  # as versions before notes wrote it
        np.savez_compressed(file, regions=np.zeros((1, 3, 4, 5), np.uint8))
    assert second.output(case()).notes == ()


def test_a_nested_label_at_the_border_enlarges_what_it_lies_in_and_is_cut_elsewhere() -> None:
    labels = Labels.parse("liver,tumour,necrosis", "tumour:liver,necrosis:tumour")
    regions = np.zeros((3, 16, 8, 8), np.float32)
    regions[0, 6:12] = 0.9
    regions[1, 4:6, 2:5, 2:5] = 0.8  # beside the liver as another source draws it
    regions[2, 4:5, 2:5, 2:5] = 0.6
    regions[1, 1:3, 6:8, 6:8] = 0.7  # far from it
    regions[1, 3, 0, 0] = 0.4  # no mask
    before = regions.copy()
    found = nest(regions, labels)
    np.testing.assert_array_equal(found[0, 4:6, 2:5, 2:5], before[1, 4:6, 2:5, 2:5])
    np.testing.assert_array_equal(found[1, 4:6], before[1, 4:6])
    np.testing.assert_array_equal(found[2], before[2])
    assert not found[:, :4].any()
    assert (found[0] >= found[1]).all()
    assert (found[1] >= found[2]).all()
