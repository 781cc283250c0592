"""Changed intensities of training patches."""

from __future__ import annotations

import pytest
import torch

from aslseg.compute.augment import DARKEST, random_intensity
from aslseg.settings import load_settings
from aslseg.ssl.batches import Batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_half_of_the_patches_without_calibrated_intensities_are_darkened():
    bright = torch.full((400, 1, 4, 4, 4), 0.8)
    levels = random_intensity(bright, generator(), calibrated=False).mean((1, 2, 3, 4))
    kept = random_intensity(bright, generator(), calibrated=True).mean((1, 2, 3, 4))
    assert kept.min() > 0.55
    assert 0.3 < (levels < kept.min()).float().mean() < 0.5
    assert levels.min() < 0.35
    assert levels.min() > 0.8 * DARKEST - 0.2
    assert torch.equal(bright, torch.full((400, 1, 4, 4, 4), 0.8))


def test_the_same_seed_changes_intensities_in_the_same_way():
    image = torch.rand((3, 1, 6, 6, 6), generator=generator(5))
    first, again = (random_intensity(image, generator(1), calibrated=False) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(("modality", "darkened"), [("ct", False), ("mr", True)])
def test_patches_of_mr_are_darkened_and_those_of_ct_are_not(modality, darkened):
    settings = load_settings({"modality": modality}, env={})[0]
    batches = Batches.__new__(Batches)
    batches.settings = settings
    found = batches.strong(torch.full((200, 1, 4, 4, 4), 0.8), generator()).mean((1, 2, 3, 4))
    assert bool(found.min() < 0.4) is darkened
