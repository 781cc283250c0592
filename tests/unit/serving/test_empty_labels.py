"""An empty human label is saved only when somebody says that it is meant."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from aslseg.cases.studies import FINAL, ORIGINAL
from aslseg.serving.empty_labels import AGAIN_SECONDS, EmptyLabels
from aslseg.serving.http_errors import RefusedError
from aslseg.serving.studies_datastore import StudiesDatastore
from aslseg.settings import Paths, Settings
from aslseg.types import Labels

EMPTY = np.zeros((4, 4, 4), np.uint8)
DRAWN = np.ones((4, 4, 4), np.uint8)
LABELS = Labels.parse("liver,tumour")


def test_a_second_submit_means_it() -> None:
    empty = EmptyLabels(LABELS)
    with pytest.raises(
        RefusedError, match=r"label of a is empty.*no liver and no tumour, submit it once more"
    ) as refused:
        empty.require_meant("a", EMPTY, {"client_id": "ann"})
    assert refused.value.status == 409
    empty.require_meant("a", EMPTY, {"client_id": "ann"})
    with pytest.raises(RefusedError):
        empty.require_meant("a", EMPTY, {"client_id": "ann"})


def test_of_the_same_scan_by_the_same_person_within_half_an_hour() -> None:
    now = [0.0]
    empty = EmptyLabels(LABELS, lambda: now[0])
    for case, who in (("a", "ann"), ("b", "ann"), ("a", "bob")):
        with pytest.raises(RefusedError):
            empty.require_meant(case, EMPTY, {"client_id": who})
    now[0] = AGAIN_SECONDS + 1
    with pytest.raises(RefusedError):
        empty.require_meant("a", EMPTY, {"client_id": "ann"})


def test_a_drawn_label_between_them_takes_the_first_one_back() -> None:
    empty = EmptyLabels(LABELS)
    with pytest.raises(RefusedError):
        empty.require_meant("a", EMPTY, {})
    empty.require_meant("a", DRAWN, {})
    with pytest.raises(RefusedError):
        empty.require_meant("a", EMPTY, {})


def test_a_script_says_so_with_a_parameter() -> None:
    empty = EmptyLabels(LABELS)
    empty.require_meant("a", EMPTY, {"empty": True})
    with pytest.raises(RefusedError):
        empty.require_meant("a", EMPTY, {"empty": "no"})


def test_the_datastore_asks_for_human_labels_only(tmp_path: Path) -> None:
    studies, upload = tmp_path / "studies", tmp_path / "up.nii.gz"
    studies.mkdir()
    nib.save(nib.Nifti1Image(np.zeros(EMPTY.shape, np.int16), np.eye(4)), studies / "a.nii.gz")
    nib.save(nib.Nifti1Image(EMPTY, np.eye(4)), upload)
    settings = Settings(min_free_gb=0, model_dir=str(tmp_path / "models"))
    store = StudiesDatastore(str(studies), settings, Paths(settings, studies))
    store.save_label("a", str(upload), ORIGINAL, {})
    with pytest.raises(RefusedError, match="empty"):
        store.save_label("a", str(upload), FINAL, {"label_info": [{"name": "liver", "idx": 1}]})
    assert store.get_labeled_images() == []
    store.save_label("a", str(upload), FINAL, {"label_info": [{"name": "liver", "idx": 1}]})
    assert store.get_labeled_images() == ["a"]
