"""The chain of models by itself: what each stage is given, what is computed once, and the native scan on demand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aslseg.errors import NoModelError
from aslseg.models import cascade
from aslseg.models.cascade import NEEDS, Cascade, CascadeInput, StageOutput, compute, compute_chain, published_files
from aslseg.models.kinds import PUBLISHED_KINDS, ModelKind
from aslseg.models.loaded import LOADERS
from aslseg.models.model_set import ModelSet
from aslseg.settings import Paths, Settings
from aslseg.ssl.predict import Prediction
from aslseg.types import Volume

SETTINGS = Settings(labels="liver,tumour", nested="tumour:liver")
SHAPE = (4, 5, 3)


class SSL:
    """Stands in for an SSL model: the image is the liver."""

    spacing = None

    def __init__(self, note: str = "") -> None:
        self.calls, self.notes = 0, (note,) if note else ()

    def run(self, image: np.ndarray, *, regions: bool) -> Prediction:
        assert regions
        self.calls += 1
        return Prediction(np.stack([image, np.zeros_like(image)]), notes=self.notes)


class Adapter:
    """Stands in for an adaptation network: the mean of both inputs."""

    def __init__(self) -> None:
        self.given: list[tuple[np.ndarray, np.ndarray]] = []

    def predict(self, image: np.ndarray, sam_regions: np.ndarray, ssl_regions: np.ndarray) -> np.ndarray:
        self.given.append((sam_regions, ssl_regions))
        return (sam_regions + ssl_regions) / 2


@pytest.fixture
def redrawn(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What SAM was asked to redraw; its answer is all ones."""
    asked: list[np.ndarray] = []

    def redraw(model: Any, image: np.ndarray, regions: np.ndarray, settings: Settings) -> np.ndarray:
        asked.append(regions)
        return np.ones_like(regions)

    monkeypatch.setattr(cascade, "redraw", redraw)
    return asked


def given() -> CascadeInput:
    image = np.linspace(0, 1, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    return CascadeInput.from_volume(Volume(image, np.eye(4)), SETTINGS, None)


def test_every_kind_has_its_needs_and_its_loader_and_no_stage_needs_itself() -> None:
    assert set(NEEDS) == set(ModelKind) == set(LOADERS)
    for kind in PUBLISHED_KINDS:
        # published in an order in which everything that is needed comes first
        earlier = PUBLISHED_KINDS[: PUBLISHED_KINDS.index(kind)]
        assert set(NEEDS[kind]) <= set(earlier)


def test_the_chain_computes_what_is_missing_once(redrawn: list[np.ndarray]) -> None:
    models = {ModelKind.SSL: SSL("memory ran out"), ModelKind.SAM: object(), ModelKind.ADAPTER: Adapter()}
    known: dict[ModelKind, StageOutput] = {}
    seconds: dict[str, float] = {}
    scan = given()
    out = compute_chain(ModelKind.ADAPTER, models.__getitem__, scan, SETTINGS, known, seconds)
    assert list(known) == [ModelKind.SSL, ModelKind.SAM, ModelKind.ADAPTER]
    assert set(seconds) == {"ssl", "sam", "adapter"}
    assert known[ModelKind.SSL].notes == ("memory ran out",)
    assert redrawn[0] is known[ModelKind.SSL].regions
    np.testing.assert_allclose(out.regions[0], (1 + scan.image) / 2)
    assert compute_chain(ModelKind.ADAPTER, models.__getitem__, scan, SETTINGS, known, seconds) is out
    assert models[ModelKind.SSL].calls == len(redrawn) == 1


def test_a_missing_model_is_asked_for_only_when_its_stage_is_computed() -> None:
    def get(kind: ModelKind) -> Any:
        raise NoModelError(f"no {kind} model")

    known = {ModelKind.SSL: StageOutput(np.zeros((2, *SHAPE), np.float32))}
    assert compute_chain(ModelKind.SSL, get, given(), SETTINGS, known) is known[ModelKind.SSL]
    with pytest.raises(NoModelError, match="no sam model"):
        compute_chain(ModelKind.ADAPTER, get, given(), SETTINGS, known)


def test_canvas_probabilities_become_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), SHAPE).transpose(3, 0, 1, 2).astype(np.float32)
    monkeypatch.setattr(cascade.canvas, "predict", lambda *_: probabilities)
    out = compute(ModelKind.CANVAS, object(), given(), {}, SETTINGS)
    np.testing.assert_array_equal(out.regions, SETTINGS.label_set.region_probabilities(probabilities))


def test_the_native_scan_is_read_only_on_demand() -> None:
    volume, reads = Volume(np.ones((8, 8, 4), np.float32), np.diag([1.0, 1, 2, 1])), []

    def load() -> Volume:
        reads.append(1)
        return volume

    scan = CascadeInput.from_volume(volume, SETTINGS, (2.0, 2.0, 4.0), load)
    assert scan.image.shape == scan.grid.shape == (4, 4, 2)
    assert compute(ModelKind.SSL, SSL(), scan, {}, SETTINGS).regions.shape == (2, 4, 4, 2)
    assert not reads
    assert scan.load_native() is volume
    assert CascadeInput.from_volume(volume, SETTINGS, None).load_native() is volume


def test_masks_lie_on_the_scans_own_grid(redrawn: list[np.ndarray]) -> None:
    models = {ModelKind.SSL: SSL(), ModelKind.SAM: object()}
    array = np.full((6, 8, 4), -1000, np.float32)
    array[2:4] = 900
    # axes in another order than the working grid's
    affine = np.array([[0, 2.0, 0, 0], [1.0, 0, 0, 0], [0, 0, -3.0, 9], [0, 0, 0, 1]])
    masks = Cascade(models, SETTINGS).masks(Volume(array, affine))
    assert list(masks) == [ModelKind.SSL, ModelKind.SAM]
    np.testing.assert_array_equal(masks[ModelKind.SSL] == 1, array > 0)
    assert (masks[ModelKind.SAM] == 2).all()


def test_nothing_published_is_said_with_the_remedy(tmp_path: Any) -> None:
    settings = SETTINGS.model_copy(update={"model_dir": str(tmp_path / "models")})
    with pytest.raises(NoModelError, match=r"no ssl model is published in .*models.*; run `aslseg round` first"):
        published_files(Paths(settings, tmp_path), ModelKind.ADAPTER)


def test_a_model_set_hashes_each_file_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from aslseg.models import model_set as files

    read, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path.name) or sha256(path))
    for name in ("ssl", "sam", "other"):
        (tmp_path / name).write_text(name)
    models = ModelSet({ModelKind.SSL: tmp_path / "ssl", ModelKind.SAM: tmp_path / "sam"})
    assert list(models.hashes) == ["ssl", "sam"]
    changed = models.with_file(ModelKind.SAM, tmp_path / "other")
    assert changed.hashes["ssl"] == models.hashes["ssl"]
    assert changed.hashes["sam"] != models.hashes["sam"]
    assert models.with_file(ModelKind.SSL, tmp_path / "ssl") is models
    assert sorted(read) == ["other", "sam", "ssl"]
