"""Batches of the second stage: unlabelled scans with synthetic lesions."""

from __future__ import annotations

import numpy as np
import torch

from aslseg.cases.prepared_case import Prepared
from aslseg.compute.hardware import resolved
from aslseg.ssl import nested_batches
from aslseg.ssl.nested import REACH_MM
from aslseg.ssl.nested_batches import NestedBatches
from aslseg.types import Volume
from aslseg.volume.geometry import Grid

SHAPE = (32, 32, 16)


def view(labelled: bool) -> Prepared:
    """A parent in the middle that gets brighter from right to left; a lesion in it."""
    image = np.broadcast_to(np.linspace(0.3, 0.7, SHAPE[0], dtype=np.float32)[:, None, None], SHAPE).copy()
    label = np.zeros(SHAPE, np.uint8)
    label[6:26, 6:26, 3:13] = 1
    parent = np.where(label, REACH_MM + 5, REACH_MM - 5).astype(np.float16)
    label[14:17, 14:17, 7:9] = 2
    grid = Grid.of(Volume(image, np.eye(4)), None)
    return Prepared("a", "a", image, grid, label if labelled else None, parent=parent)


def batches(tiny_settings, unlabelled: bool = False, **changes: object) -> NestedBatches:
    settings = tiny_settings(labels="liver,tumour", nested="tumour:liver", batch_labelled=2, **changes)
    free = [view(False)] if unlabelled else []
    return NestedBatches([view(True)], free, resolved(settings), SHAPE, torch.device("cpu"))


def test_unlabelled_scans_give_labelled_patches_of_synthetic_lesions(tiny_settings, monkeypatch):
    monkeypatch.setattr(nested_batches, "UNLABELLED_PART", 1.0)
    made = batches(tiny_settings, unlabelled=True)
    for n in range(5):
        real, synthetic = made.draw(np.random.default_rng(n))
        assert (real.weight == 1).all()
        assert (synthetic.weight[synthetic.label == 2] == 1).all()
        assert 0 < synthetic.weight.mean() < 1
    alone = batches(tiny_settings, unlabelled=True, nested_synthetic=0).draw(np.random.default_rng(0))
    assert all((patch.weight == 1).all() for patch in alone)
