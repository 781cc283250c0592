"""What version 0.1 left on disk still opens, and work goes on from it; ``fixtures/make_version_0_1.py`` made it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recorded_clicks as recorded
from aslseg.models.kinds import PUBLISHED_KINDS
from aslseg.models.published import find_published
from aslseg.rounds.label_files.masks import verify_label_files
from aslseg.rounds.label_files.rollback import roll_back
from aslseg.rounds.ledger.anchor import read_head
from aslseg.rounds.ledger.ledger import Ledger
from aslseg.rounds.run import run_round, train_stage
from aslseg.settings import Paths, Settings, load_settings
from aslseg.settings.sources import REMOVED, RENAMED
from aslseg.ssl import networks
from tiny_rounds import label_hashes, make_tiny, published_hashes, tiny_network

FOLDER = Path(__file__).parents[1] / "fixtures" / "version_0_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
CASE = "phantom_004"  # whose masks were recorded


@dataclass
class Left:
    """A studies folder of version 0.1 and the settings that it was used with."""

    root: Path
    settings: Settings

    @property
    def studies(self) -> Path:
        return self.root / "studies"

    @property
    def paths(self) -> Paths:
        return Paths(self.settings, self.studies)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.paths.ledger)

    def app(self) -> Any:
        """The app on it, which reads the old settings file by itself."""
        conf = {k: str(self.root / v) for k, v in PATHS.items()}
        old = (line.split("=", 1) for line in (self.root / "settings.env").read_text().splitlines())
        conf |= {k.removeprefix("ASLSEG_").lower(): v for k, v in old}
        return recorded.app(self.studies, self.root / "models", **conf)


PATHS = {"model_dir": "models", "sam_checkpoint": "sam.safetensors"}


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Left]:
    """Unpacked in a folder that is not the one it was made in."""
    with tarfile.open(FOLDER / "left.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.setattr(networks, "unet", tiny_network)
    conf = {k: str(tmp_path / v) for k, v in PATHS.items()}
    # none of them was there at that time
    conf |= {"label_folds": "0", "promote_floor": "0", "nested_fraction": "0"}
    settings, _ = load_settings(conf, env={}, dotenv=tmp_path / "settings.env")
    with recorded.without_bfloat16():
        yield Left(tmp_path, settings)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """What :func:`tiny_rounds.make_tiny` changes, for one test."""
    from aslseg.rounds.promotion import canaries, promotion
    from aslseg.ssl import engine

    monkeypatch.setattr(engine, "STATISTICS_BATCHES", engine.STATISTICS_BATCHES)
    monkeypatch.setattr(promotion, "judge", promotion.judge)
    monkeypatch.setattr(canaries, "FLOOR", canaries.FLOOR)
    make_tiny()


def contents(folder: Path, pattern: str = "*.npy") -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of every array in a folder."""
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob(pattern)}


def test_every_setting_is_read_under_its_old_name(left: Left) -> None:
    lines = (left.root / "settings.env").read_text().splitlines()
    _, origin = load_settings({}, env={}, dotenv=left.root / "settings.env")
    names = [line.split("=")[0].removeprefix("ASLSEG_").lower() for line in lines]
    assert len(names) == 68
    read = {RENAMED.get(name, name) for name in names} - set(REMOVED)
    assert {name for name, source in origin.items() if source == ".env"} == read
    assert (left.settings.ssl_iterations, left.settings.network) == (200, "unet")
    assert left.settings.thresholds == {"liver": 0.0, "tumour": 0.0}


def test_ledger_tells_what_was_decided(left: Left) -> None:
    ledger = left.ledger
    assert ledger.verify() is None
    assert [(r.number, r.state) for r in ledger.rounds()] == [(1, "done")]
    assert [p.case for p in ledger.promotions()] == EXPECTED["promoted"]
    assert {s.case: s.agreement for s in ledger.scores()} == EXPECTED["scores"]
    assert len(ledger.events()) == EXPECTED["events"]
    assert read_head(ledger.anchor) == ledger.head(), "version 0.1 kept none"
    assert verify_label_files(left.paths) == []
    assert label_hashes(left.studies) == EXPECTED["labels"]


def test_a_round_of_the_version_before_is_rolled_back(left: Left) -> None:
    roll_back(left.paths, 1)
    assert label_hashes(left.studies) == {k: v for k, v in EXPECTED["labels"].items() if k.startswith("final/")}
    assert published_hashes(left.settings, left.studies) == {}
    assert left.ledger.verify() is None
    assert [r.state for r in left.ledger.rounds()] == ["rolled back"]
    assert verify_label_files(left.paths) == []


@pytest.mark.parametrize("model", ["ssl", "adapter", "aslseg", "sam"])
def test_published_models_load_and_predict_the_same(left: Left, model: str) -> None:
    models = {kind: find_published(left.paths, kind, check=True) for kind in PUBLISHED_KINDS}
    assert {kind: m.sha256 for kind, m in models.items() if m is not None} == EXPECTED["models"]
    params = {"foreground": [[16, 16, 8]], "label": "liver"} if model == "sam" else {}
    mask, _ = recorded.ask(left.app(), {"model": model, "image": CASE, "client": "ann", "params": params})
    with np.load(FOLDER / "masks.npz") as file:
        expected = file[model]
    assert mask.shape == tuple(EXPECTED["shape"])
    # on account of the instruction set, as for recorded clicks
    assert (mask != expected).sum() <= 5e-4 * mask.size


def test_datastore_of_the_version_before(left: Left) -> None:
    store = left.app().datastore()
    assert sorted(store.list_images()) == [f"phantom_00{n}" for n in range(5)]
    assert sorted(store.get_labeled_images()) == [f"phantom_00{n}" for n in range(3)]
    assert store.get_label_uri(CASE, "original").endswith(f"labels/original/{CASE}.nii.gz")


def test_embeddings_made_before_are_found(left: Left) -> None:
    folder = left.paths.cache / "embeddings"
    before = contents(folder, "*/*.npy")
    assert sorted(before) == EXPECTED["embeddings"]
    request = {
        "model": "sam_2d",
        "image": EXPECTED["embedded"],
        "client": "ann",
        "params": {"foreground": [[16, 16, 8]]},
    }
    recorded.ask(left.app(), request)
    after = contents(folder, "*/*.npy")
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert [name for name in after if after[name][0] > before[name][0]], "a file that is read is touched"


@pytest.mark.usefixtures("tiny")
def test_the_next_round_goes_on_from_it(left: Left) -> None:
    prepared = contents(left.paths.cache)
    assert sorted(prepared) == EXPECTED["cache"]
    summary = run_round(left.studies, left.settings)
    assert (summary["round"], summary["continued"]) == (2, False)
    assert contents(left.paths.cache) == prepared, "prepared scans are found and not prepared again"
    assert not {"ssl", "sam", "adapter"} & set(summary["measured"]), "trained models are found and not trained again"
    assert {k: v for k, v in label_hashes(left.studies).items() if k.startswith("final/")} == {
        k: v for k, v in EXPECTED["labels"].items() if k.startswith("final/")
    }
    ledger = left.ledger
    assert ledger.verify() is None
    assert [(r.number, r.state) for r in ledger.rounds()] == [(1, "done"), (2, "done")]
    assert verify_label_files(left.paths) == []
    # and the round before is still there to go back to
    roll_back(left.paths, 2)
    assert label_hashes(left.studies) == EXPECTED["labels"]
    assert published_hashes(left.settings, left.studies) == EXPECTED["models"]


@pytest.mark.usefixtures("tiny")
def test_every_step_of_a_round_that_was_rolled_back_is_found_again(left: Left) -> None:
    roll_back(left.paths, 1)
    summary = run_round(left.studies, left.settings)
    # the round starts from what round 1 started from; but what was rolled back is not promoted again
    assert set(summary["measured"]) <= {"prepare", "rank", "promote", "retrain", "publish", "originals"}
    assert not set(summary["promoted"] + summary["withdrawn"]) & set(EXPECTED["promoted"])
    labels = {k: v for k, v in label_hashes(left.studies).items() if "pseudo" not in k}
    assert labels.keys() == {k for k in EXPECTED["labels"] if "pseudo" not in k}
    models = published_hashes(left.settings, left.studies)
    assert {models[kind] for kind in ("sam", "adapter")} < set(EXPECTED["models"].values())


@pytest.mark.usefixtures("tiny")
def test_its_promoted_masks_can_be_learned_from_scratch(left: Left) -> None:
    settings = left.settings.model_copy(update={"retrain_from": "scratch", "uncertainty_weight": 0.1})
    summary = run_round(left.studies, settings)
    step = json.loads((Path(summary["models"]["ssl"]).parent / "inputs.json").read_text())
    assert step["init"] is None
    assert step["weights"] == [settings.promote_weight, settings.disagreement_weight]
    # they have no map of certainty; those of this round have
    assert [len(key) for key in step["promoted"]] == [4] * len(EXPECTED["promoted"])
    assert all(len(e.details["confidence"]) == 64 for e in left.ledger.masks("aslseg_pseudo").values() if e.round == 2)
    assert verify_label_files(left.paths) == []


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_training_goes_on_from_its_checkpoint(left: Left) -> None:
    (path,) = (left.root / p for p in EXPECTED["checkpoint"])
    assert path.is_file()
    train_stage("ssl", left.studies, left.settings.model_copy(update={"ssl_iterations": 8}))
    assert json.loads(path.with_name("result.json").read_text())["steps"] == 4
    assert not path.exists()
