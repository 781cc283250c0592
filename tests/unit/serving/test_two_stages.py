"""Published models of two stages, served: the same masks as without a server, and what is not certain is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aslseg.api import load_model
from aslseg.models.kinds import ModelKind
from aslseg.models.loaded import Models
from aslseg.rounds.run import run_round
from aslseg.serving.cascade_cache import CascadeCache
from aslseg.serving.infer_tasks import AdapterTask, CascadeTask, MaskTask
from aslseg.serving.inference_request import InferenceRequest
from aslseg.serving.params import validate_params
from aslseg.settings import Paths, Settings
from aslseg.ssl import networks
from aslseg.ssl import predict as ssl_predict
from aslseg.volume.io import read_image
from tiny_rounds import tiny_network, tiny_settings, tiny_studies

SCAN = "phantom_003"
TASKS = {ModelKind.SSL: MaskTask, ModelKind.SAM: MaskTask, ModelKind.ADAPTER: AdapterTask}


NOTE = "liver was not found; the whole scan was searched for tumour"


class Served:
    """A studies folder after its first round."""

    def __init__(self, studies: Path, settings: Settings, summary: dict[str, Any]) -> None:
        self.studies, self.settings, self.summary = studies, settings, summary
        self.path = studies / f"{SCAN}.nii.gz"

    def ask(self, task: type[MaskTask], kind: ModelKind, case: str | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A mask on the scan's own grid, and what the client is sent with it."""
        scans = CascadeCache(Models(self.settings, Paths(self.settings, self.studies)))
        request = InferenceRequest(kind.value, self.path, validate_params({}), case)
        mask, _, about = task(scans, kind, (), "").mask(self.path, request, {})
        return mask, about


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As after a first stage that finds no liver in any scan."""
    root = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "unet", lambda classes, patch, last_relu=True: tiny_network(classes, patch))
        patch.setattr(ssl_predict, "largest", np.zeros_like)
        studies, settings = tiny_studies(root, cases=5), tiny_settings(root, nested_fraction=0.5)
        yield Served(studies, settings, run_round(studies, settings))


@pytest.mark.parametrize("kind", TASKS)
def test_each_model_serves_what_the_package_computes(served: Served, kind: ModelKind) -> None:
    mask, about = served.ask(TASKS[kind], kind)
    model = load_model(served.studies, kind.value, served.settings)
    np.testing.assert_array_equal(mask, model.segment(read_image(served.path)))
    assert NOTE in about["notes"]
    assert mask.any()


def test_a_stored_mask_says_what_a_computed_one_says(served: Served) -> None:
    mask, about = served.ask(CascadeTask, ModelKind.ADAPTER, SCAN)
    assert (about["source"], about["notes"]) == ("stored", [NOTE])
    np.testing.assert_array_equal(mask, read_image(served.studies / "labels" / "original" / f"{SCAN}.nii.gz").array)
    refined, about = served.ask(AdapterTask, ModelKind.ADAPTER, SCAN)
    assert (about["source"], about["notes"]) == ("stored", [NOTE])
    assert (refined == served.ask(MaskTask, ModelKind.ADAPTER)[0]).mean() > 0.95, "each stage is kept in 8 bits"


def test_a_round_that_finds_its_predictions_says_it_again(served: Served) -> None:
    says = f"phantom_002, phantom_003, phantom_004: {NOTE}"
    assert says in served.summary["warnings"]
    assert not any("phantom_000" in line and NOTE in line for line in served.summary["warnings"]), "a human label"
    assert says in run_round(served.studies, served.settings)["warnings"]
