"""The model `adapter` on a scan: what the last round refined is served while its SAM and its adapter are published."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aslseg.compute.hardware import resolved
from aslseg.compute.weights import save_weights
from aslseg.files import sha256
from aslseg.models.kinds import ModelKind
from aslseg.models.model_set import ModelSet
from aslseg.rounds.ledger.ledger import Ledger, Score
from aslseg.rounds.steps.predictions import prediction_folder
from aslseg.serving.infer_tasks import AdapterTask, MaskTask
from aslseg.serving.inference_request import InferenceRequest
from aslseg.serving.params import validate_params
from aslseg.settings import Paths, Settings
from aslseg.types import Volume
from aslseg.volume.io import write_image

ROUND = {"ssl": "1" * 64, "sam": "2" * 64, "adapter": "3" * 64}
RETRAINED = ROUND | {"ssl": "4" * 64}
AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])


class Served:
    """A studies folder after a round that refined the scan `a`."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(model_dir=str(folder / "models"), device="cpu")
        self.paths, self.published_hashes = Paths(self.settings, folder), RETRAINED
        self.scan, self.ssl = folder / "a.nii.gz", folder / "ssl.safetensors"
        write_image(self.scan, Volume(np.zeros((8, 8, 6), np.float32), AFFINE))
        save_weights(self.ssl, {"w": torch.zeros(1)}, {"kind": "ssl", "spacing": [2.0, 2.0, 4.0]})
        Ledger(self.paths.ledger).set_scores([Score("a", 1, 0.5, {"models": ROUND})])
        models = ModelSet({ModelKind(k): Path() for k in ROUND}, {ModelKind(k): h for k, h in ROUND.items()})
        name = prediction_folder(ModelKind.ADAPTER, models, resolved(self.settings))
        self.kept = self.paths.rounds / "steps" / name / f"a-{sha256(self.scan)[:12]}.npz"
        self.kept.parent.mkdir(parents=True)
        self.keep((2, 4, 4, 3))

    def keep(self, shape: tuple[int, ...]) -> None:
        regions = np.zeros(shape, np.uint8)
        regions[0, :2] = 255
        np.savez_compressed(self.kept, regions=regions)

    def hashes(self) -> dict[str, str]:
        return self.published_hashes

    def published(self, kind: ModelKind) -> Any:
        return SimpleNamespace(path=self.ssl)

    def ask(self, case: str | None = "a") -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        task = AdapterTask(SimpleNamespace(models=self), ModelKind.ADAPTER, (), "")  # type: ignore[arg-type]
        return task.mask(self.scan, InferenceRequest("adapter", self.scan, validate_params({}), case), {})


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    computed = (np.zeros((8, 8, 6), np.uint8), AFFINE, {"source": "computed"})
    monkeypatch.setattr(MaskTask, "mask", lambda *_: computed)
    return Served(tmp_path)


def test_what_the_round_refined_lies_on_the_scans_own_grid(served: Served) -> None:
    mask, affine, told = served.ask()
    assert told == {"source": "stored"}
    assert np.array_equal(affine, AFFINE)
    expected = np.zeros((8, 8, 6), np.uint8)
    expected[4:] = 1  # the first axis of the scan runs to the left, that of the working grid to the right
    assert np.array_equal(mask, expected)


def test_it_is_computed_where_anything_else_was_published_or_kept(served: Served) -> None:
    served.published_hashes = RETRAINED | {"sam": "5" * 64}
    assert served.ask()[2] == {"source": "computed"}, "another SAM"
    served.published_hashes = {"ssl": ROUND["ssl"]}
    assert served.ask()[2] == {"source": "computed"}, "no adapter"
    served.published_hashes = RETRAINED
    assert served.ask(case=None)[2] == {"source": "computed"}, "an upload"
    served.keep((2, 5, 4, 3))
    assert served.ask()[2] == {"source": "computed"}, "another working grid"
    served.keep((2, 4, 4, 3))
    write_image(served.scan, Volume(np.ones((8, 8, 6), np.float32), AFFINE))
    assert served.ask()[2] == {"source": "computed"}, "another scan under the same name"


def test_a_damaged_ledger_does_not_matter(served: Served) -> None:
    served.paths.ledger.write_bytes(b"no database" * 100)
    assert served.ask()[2] == {"source": "computed"}
