"""What is encoded overnight is what the server finds by day."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from aslseg.compute.weights import save_weights
from aslseg.models.loaded import Models
from aslseg.sam.modeling.architecture import Architecture, build
from aslseg.sam.predictor.embedding_store import EmbeddingStore
from aslseg.sam.predictor.embeddings import EmbeddingCache
from aslseg.serving.embed import embed_studies
from aslseg.serving.open_scans import ScanCache
from aslseg.settings import Paths, Settings

TINY = Architecture(64, 8, 32, 1, 2, 4, (0,), 32, 64, 4)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Scans a and b without a human label, c with one, d broken; a has an automatic mask on slices 9 to 11."""
    folder = tmp_path / "studies"
    rng = np.random.default_rng(0)
    for name in "abc":
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(rng.integers(-100, 200, (16, 16, 24)).astype(np.int16), np.eye(4)), path)
    (folder / "d.nii.gz").write_bytes(b"no image")
    mask = np.zeros((16, 16, 24), np.uint8)
    mask[4:8, 4:8, 9:12] = 1
    for name, tag in (("a", "original"), ("c", "final")):
        (folder / "labels" / tag).mkdir(parents=True)
        nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / "labels" / tag / f"{name}.nii.gz")
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save_weights(path, build(TINY).state_dict(), {"kind": "sam", "architecture": TINY.to_metadata()})
    return Settings(sam_checkpoint=str(path), model_dir=str(tmp_path / "models"), min_free_gb=0, device="cpu")


def test_waiting_scans_are_encoded_and_found_again(studies: Path, settings: Settings) -> None:
    done = embed_studies(studies, settings, 10)
    assert done["cases"] == ["a", "b"]
    assert (done["slices"], done["encoded"]) == (13 + 24, 37), "five slices around the mask of a, all of b"
    assert list(done["skipped"]) == ["d"]
    paths = Paths(settings, studies)
    model = Models(settings, paths).get("sam")
    cache = EmbeddingCache(0, EmbeddingStore(paths.cache / "embeddings", 1e9))
    opened = ScanCache(settings).open(studies / "a.nii.gz")
    assert [k for k in range(24) if cache.has(opened.source.name(k, model))] == list(range(4, 17))
    again = embed_studies(studies, settings, 10)
    assert (again["slices"], again["encoded"]) == (37, 0)


def test_another_window_is_encoded_anew(studies: Path, settings: Settings) -> None:
    embed_studies(studies, settings, 1)
    assert embed_studies(studies, settings.model_copy(update={"window_low": -100.0}), 1)["encoded"] == 13


def test_it_stops_before_new_embeddings_push_out_those_just_made(studies: Path, settings: Settings) -> None:
    one = 2 * 32 * 8 * 8 + 128
    done = embed_studies(studies, settings.model_copy(update={"embedding_disk_gb": 20 * one / 1e9}), 10)
    assert (done["cases"], done["full"]) == (["a"], True)
